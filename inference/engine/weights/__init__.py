"""Model files: manifests, storage under dm-verity, the hub."""
