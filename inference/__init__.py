"""The backend and its client. README.md of channel/ has the protocol."""
