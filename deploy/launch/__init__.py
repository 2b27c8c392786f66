"""The host's side of a confidential VM: QEMU's or libvirt's configuration, and whether the host can run it."""
