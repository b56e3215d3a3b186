"""A stock QEMU, a stock Linux guest and its load, for demonstrations and end-to-end tests.

Knows nothing of migration: it makes the machines that `send` and `receive` are shown with.
"""
