"""The gateway alone against a synthetic engine, beside nginx with TLS and LiteLLM's proxy in front of it."""
