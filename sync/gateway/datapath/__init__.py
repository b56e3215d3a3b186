"""What the gateway does with messages between VMM and device: relay, trap, capture, track DMA."""
