"""The vfio-user protocol: codec, framing, migration states, a server and a client library.

`protocol` has every message, `framing` turns bytes and descriptors into messages, `migration` is
the device-state machine, `server` and `client` are the blocking shells.
Source: QEMU, docs/interop/vfio-user.rst.
"""
