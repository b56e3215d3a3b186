"""Programs that a benchmark starts as processes of their own: peers, devices, receivers."""
