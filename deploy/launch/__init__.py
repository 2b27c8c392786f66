"""The host's side of a confidential VM: what QEMU or libvirt is told, and whether the host can do it."""
