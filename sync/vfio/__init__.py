"""Functions of the host, through the kernel's VFIO: the legacy container and group."""
