"""What CC-On costs on a GPU: its parts measured, and a model of the whole."""
