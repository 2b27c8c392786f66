"""NVIDIA GPUs in confidential-computing mode: their reports, what NVIDIA signs about them, and the device."""
