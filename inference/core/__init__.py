"""What both sides of the backend share: configuration, the steps of its life, logs."""
