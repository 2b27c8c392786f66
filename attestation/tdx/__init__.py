"""Intel TDX: quotes, their verification, and the device that makes them."""
