"""An NVMe controller over vfio-user, with namespaces in image files."""
