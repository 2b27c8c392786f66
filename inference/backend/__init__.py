"""One backend put together: its parts from the configuration, and its life from start to drain."""
