"""What `vfio-ferry doctor` looks at: this host, QEMU programs, a running VMM, gateways.

Each part is an async generator of findings. Nothing here changes what it looks at, and what does
not answer becomes a finding within seconds.
"""
