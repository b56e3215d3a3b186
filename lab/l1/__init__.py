"""A host with an IOMMU and PCI devices, emulated in a process: where kernel VFIO can be tried.

Starts it, runs one program in it, and brings the result back. Knows nothing of what the program is.
"""
