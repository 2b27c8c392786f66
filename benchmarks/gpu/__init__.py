"""The real models' shapes on a real GPU, in pieces that fit a short loan of one."""
