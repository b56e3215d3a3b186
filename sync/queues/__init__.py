"""Devices whose state is queues: what a profile of registers cannot say about them."""
