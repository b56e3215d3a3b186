"""The gateway's event loop, its jobs, and the custody of the device."""
