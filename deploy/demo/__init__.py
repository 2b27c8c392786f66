"""The demo: its models, made at set-up, its processes, and the scenes of `make demo`."""
