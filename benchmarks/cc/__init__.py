"""What CC-On costs on a GPU: the parts of it measured, and a model of the whole."""
