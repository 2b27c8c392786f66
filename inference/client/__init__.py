"""The client: a transport for HTTP libraries and a local proxy. Each verifies a backend before it sends anything."""
