"""The file that a run leaves: its schema, its types and their statistics."""
