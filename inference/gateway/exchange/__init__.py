"""The hot path: one sealed request and its answer."""
