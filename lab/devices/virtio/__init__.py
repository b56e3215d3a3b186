"""A virtio block device over PCI as a vfio-user device."""
