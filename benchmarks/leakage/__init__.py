"""What an attacker learns from the sizes and times of answers."""
