"""Full copies of a memory image from one process to another: ours, QEMU's, and bare streams."""

from dataclasses import dataclass

DEADLINE_S = 300.0
"""How long one copy may take: 2 GiB at 100 Mbit/s take 170 s."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What one full copy took. The start of the processes does not count."""

    guest_bytes: int
    """Size of the image, pages of zeros included."""
    wire_bytes: int
    """What the copying program says that it sent."""
    wall_s: float
    source_cpu_s: float
    target_cpu_s: float

    @property
    def cpu_s(self) -> float:
        """CPU time of both sides together."""
        return self.source_cpu_s + self.target_cpu_s
