"""How models share a GPU's memory, computed from their shapes."""
