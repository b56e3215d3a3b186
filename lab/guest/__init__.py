"""A small guest of our own: VMM, driver and workload in one process.

To everybody else it is a vfio-user client with a QMP socket, as QEMU is.
"""
