"""The file that a run writes: its schema, its types and their statistics."""
