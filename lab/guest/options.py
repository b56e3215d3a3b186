"""Everything that can be chosen about a guest, and whether the choice makes sense."""

import dataclasses
import json
import sysconfig
from dataclasses import dataclass
from typing import Any, Literal

from lab.guest.errors import GuestOptionsError
from sync.memory import PAGE_BYTES

SECTOR_BYTES = 512
MIB = 1 << 20
LOW_LIMIT_BYTES = 2048 * MIB
"""RAM below 4 GiB ends here at the latest; above it is room for BARs."""
RAM_LIMIT_BYTES = 64 << 30
MAX_QUEUE_SIZE = 1024
MAX_BLOCK_BYTES = 64 << 10
DESCRIPTORS_PER_REQUEST = 3
"""Header, data and status, when no indirect table is used."""


def default_content() -> tuple[str, ...]:
    """Folders with real content that every machine with Python has."""
    return (sysconfig.get_paths()["stdlib"], "/usr/bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """What a guest is made of and what it does. Raises `GuestOptionsError` when built wrongly.

    Source and target of a migration must agree in everything that `geometry` lists.
    """

    device_path: str
    """vfio-user socket of its device (the gateway's)."""
    qmp_path: str
    """Where it listens for QMP; created with mode 0600."""
    incoming: bool = False
    """Wait for `migrate-incoming`, then stay paused: QEMU's `-S -incoming defer`."""
    low_bytes: int = 32 * MIB
    """RAM below 4 GiB. 640 KiB to 1 MiB of it are not mapped for DMA, as in a PC."""
    high_bytes: int = 96 * MIB
    """RAM from 4 GiB on."""
    rom_bytes: int = 256 << 10
    """Mapped read-only up to 4 GiB without a descriptor, as firmware is. 0: none."""
    disk: Literal["virtio-blk", "nvme"] = "virtio-blk"
    """What its device is."""
    irq: Literal["msix", "intx"] = "msix"
    queue_size: int = 128
    queue_depth: int = 16
    """Requests in flight."""
    block_bytes: int = 16 << 10
    """Size of a request's data: 4 to 64 KiB, whole pages."""
    blocks: int = 2048
    """Working set on the disk, in blocks; cut to the disk's capacity."""
    read_share: float = 0.6
    indirect_share: float = 0.5
    """Share of the requests that use an indirect descriptor table, if the device offers it."""
    iops: float = 0.0
    """Requests a second; 0: as many as the device takes."""
    flush_every: int = 64
    """Writes between two flushes; 0: never."""
    read_area_bytes: int = 64 * MIB
    """The device's reads land in turn all over this area, so it is what the device dirties."""
    write_area_bytes: int = 4 * MIB
    cache_area_bytes: int = 8 * MIB
    """Where the CPU keeps copying files to, like a page cache."""
    cpu_pages_per_s: int = 200
    """How many pages of the cache area the CPU writes each second."""
    content: tuple[str, ...] = dataclasses.field(default_factory=default_content)
    """Files, or folders with files, that everything written is made of."""
    seed: int = 1
    report_interval_s: float = 0.0
    """Print the report as a JSON line on stdout this often; 0: never."""
    device_deadline_s: float = 30.0
    """How long a device that is not there is waited for, at the start and after a loss."""
    switch_when_clean: bool = False
    """With a downtime limit of 0: switch over once nothing is dirty, as QEMU does, or never."""

    def __post_init__(self) -> None:
        self._check_types()
        self._check_memory()
        self._check_workload()

    def geometry(self) -> dict[str, int | str]:
        """What the two guests of a migration must have in common."""
        names = (
            "low_bytes high_bytes disk irq queue_size queue_depth block_bytes blocks "
            "read_area_bytes write_area_bytes cache_area_bytes"
        )
        return {name: getattr(self, name) for name in names.split()}

    @classmethod
    def from_json(cls, text: str) -> "GuestOptions":
        """The inverse of `to_json`. Raises `GuestOptionsError`."""
        try:
            fields: Any = json.loads(text)
            if "content" in fields:
                fields["content"] = tuple(fields["content"])
            return cls(**fields)
        except (TypeError, ValueError, RecursionError) as error:
            raise GuestOptionsError(f"these are no options of a guest: {error}") from error

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def _check_types(self) -> None:
        for member in dataclasses.fields(self):
            value = getattr(self, member.name)
            if member.type is float:
                fits = type(value) in (int, float)
            elif isinstance(member.type, type):
                fits = type(value) is member.type
            else:
                fits = member.name != "content" or (
                    type(value) is tuple and all(isinstance(path, str) for path in value)
                )
            if not fits:
                raise GuestOptionsError(f"{member.name} cannot be {value!r}")

    def _check_memory(self) -> None:
        for name in ("low_bytes", "high_bytes", "rom_bytes"):
            if getattr(self, name) % PAGE_BYTES:
                raise GuestOptionsError(f"{name} has to be whole pages of {PAGE_BYTES} bytes")
        self._require_range("low_bytes", 2 * MIB, LOW_LIMIT_BYTES)
        self._require_range("high_bytes", PAGE_BYTES, RAM_LIMIT_BYTES)
        self._require_range("rom_bytes", 0, 16 * MIB)
        for name in ("read_area_bytes", "write_area_bytes"):
            if getattr(self, name) < 2 * self.queue_depth * self.block_bytes:
                raise GuestOptionsError(
                    f"{name} has to hold two blocks for each request in flight: "
                    f"{2 * self.queue_depth * self.block_bytes} bytes"
                )
        if self.cache_area_bytes < PAGE_BYTES:
            raise GuestOptionsError("cache_area_bytes has to be at least a page")

    def _check_workload(self) -> None:
        if self.irq not in ("msix", "intx"):
            raise GuestOptionsError("irq has to be msix or intx")
        if self.disk not in ("virtio-blk", "nvme"):
            raise GuestOptionsError("disk has to be virtio-blk or nvme")
        if self.disk == "nvme" and self.irq != "msix":
            raise GuestOptionsError("the nvme driver takes msix alone")
        self._require_range("queue_size", 4, MAX_QUEUE_SIZE)
        if self.queue_size & (self.queue_size - 1):
            raise GuestOptionsError("queue_size has to be a power of two")
        self._require_range("queue_depth", 1, self.queue_size // DESCRIPTORS_PER_REQUEST)
        self._require_range("block_bytes", PAGE_BYTES, MAX_BLOCK_BYTES)
        if self.block_bytes % PAGE_BYTES:
            raise GuestOptionsError(f"block_bytes has to be whole pages of {PAGE_BYTES} bytes")
        self._require_range("blocks", 2 * self.queue_depth, 1 << 24)
        self._require_range("read_share", 0.0, 1.0)
        self._require_range("indirect_share", 0.0, 1.0)
        self._require_range("iops", 0.0, 1e7)
        self._require_range("flush_every", 0, 1 << 30)
        self._require_range("cpu_pages_per_s", 0, 1_000_000)
        self._require_range("report_interval_s", 0.0, 3600.0)
        self._require_range("device_deadline_s", 0.0, 3600.0)
        if not self.content:
            raise GuestOptionsError("content has to name a file or a folder")

    def _require_range(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if not least <= value <= most:
            raise GuestOptionsError(f"{name} is {value!r}, it has to be from {least} to {most}")
