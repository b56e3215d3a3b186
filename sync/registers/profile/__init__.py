"""Device profiles: what is known about a device's registers, and how it is read from TOML."""
