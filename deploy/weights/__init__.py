"""Images of model folders for dm-verity."""
