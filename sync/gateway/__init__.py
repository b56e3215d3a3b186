"""The process between a VMM and its device: relays, traps registers, tracks DMA, has the owner."""
