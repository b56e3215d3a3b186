"""virtio 1.x over PCI with split rings: devices whose state is rings and registers."""
