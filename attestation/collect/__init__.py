"""Collection on the attester: rounds, devices, and what the vendors sign about them."""
