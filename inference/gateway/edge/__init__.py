"""Where connections arrive: HTTP routes, TLS, bounds on connections, the evidence endpoint."""
