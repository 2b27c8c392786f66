"""The engines: one vLLM process per model, started, isolated, supervised. Only run/launcher.py imports vllm."""
