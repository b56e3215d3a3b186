"""The register profiles that come with vfio-ferry, one TOML file for each class of device.

The format is described in `sync.registers.profile.model`.
"""
