"""The vfio-user protocol: codec and framing.

`protocol` has every message, `framing` turns bytes and descriptors into messages, `sockets` makes
and connects UNIX sockets.
Source: QEMU, docs/interop/vfio-user.rst.
"""
