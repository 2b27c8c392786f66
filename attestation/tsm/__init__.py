"""The kernel's common interface for attestation reports (configfs-tsm)."""
