"""The web application: the only process with a network and keys. Never imports vllm, torch or a device."""
