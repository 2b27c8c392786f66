"""From an opened request to one that an engine may have."""
