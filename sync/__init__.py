"""The state that must come out equal on both sides: registers, DMA pages, devices, VMMs.

Knows no network.
"""
