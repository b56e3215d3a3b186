"""NVMe over PCIe: base specification 1.4 and 2.0."""
