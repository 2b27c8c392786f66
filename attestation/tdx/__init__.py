"""Intel TDX: quotes, their collateral, verification, and the device that makes quotes."""
