"""Programs that a benchmark starts as processes of their own: senders, receivers, devices,
guests."""
