"""What a confidential VM has to measure at its launch, computed from its inputs."""
