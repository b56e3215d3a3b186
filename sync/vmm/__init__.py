"""Driving a VMM through its migration. Knows no device, no gateway and no network."""
