"""The real models' shapes on a real GPU, in steps that fit a short loan of one."""
