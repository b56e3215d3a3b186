"""The laboratory: device models, a small guest, QEMU environments and demonstrations.

Not part of the product. The product's rooms (`transport`, `sync`, `ferry`) never import it.
"""
