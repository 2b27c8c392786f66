"""Load generation: our own client, vLLM's generator, and a relay that only copies bytes."""
