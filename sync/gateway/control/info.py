"""What a gateway tells about itself: the shapes that cross the control socket in a status.

Owned here: the dataclasses and their way to JSON and back. The state words themselves stand in
`state`.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

from sync.gateway.errors import ControlProtocolError


@dataclass(frozen=True, slots=True)
class RegionDescription:
    """A device region: VFIO_REGION_INFO flags as the device gave them, size in bytes."""

    flags: int
    size: int


@dataclass(frozen=True, slots=True)
class IrqDescription:
    """An interrupt index: VFIO_IRQ_INFO flags, number of vectors."""

    flags: int
    count: int


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the device is, from its PCI configuration header."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    revision: int
    class_code: int

    @classmethod
    def from_config_space(cls, config: bytes) -> Self:
        """Reads a type 0 header (PCI 3.0, 6.1); a space shorter than 64 bytes reads as zeros."""
        header = config[:64].ljust(64, b"\0")
        return cls(
            vendor=int.from_bytes(header[0x00:0x02], "little"),
            device=int.from_bytes(header[0x02:0x04], "little"),
            subsystem_vendor=int.from_bytes(header[0x2C:0x2E], "little"),
            subsystem=int.from_bytes(header[0x2E:0x30], "little"),
            revision=header[0x08],
            class_code=int.from_bytes(header[0x09:0x0C], "little"),
        )


@dataclass(frozen=True, slots=True)
class Supports:
    """What the device offers for a migration."""

    v2: bool = False
    """VFIO migration v2 with at least STOP_COPY."""
    precopy: bool = False
    logging: bool = False
    """DMA logging: start, stop and report."""
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """How the last recovery of the VMM went that the gateway did by itself (I8)."""

    reason: str
    ok: bool
    message: str


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """A gateway's status. The device's part is that of its last connection."""

    state: str
    """A word of `state.State`."""
    owner: str
    """A word of `state.Owner`."""
    session: str
    """The session of the ownership record, or ''."""
    verdicts: dict[str, str]
    """The latest sessions that are settled here for good: 'owned' (at some time) or 'fenced'."""
    device_connected: bool
    vmm_connected: bool
    lease: str
    """The role that holds the lease: 'source', 'target' or ''."""
    regions: dict[int, RegionDescription]
    irqs: dict[int, IrqDescription]
    config_space: bytes
    """Up to 256 bytes, as read when the device was connected."""
    identity: Identity
    supports: Supports
    layout_generation: int
    """Goes up with each change of the memory map."""
    memory_pages: int
    """Pages of 4096 bytes in the regions with a descriptor."""
    dropped_writes: int
    """Register writes and resets of the VMM not executed, since the gateway last went to
    'standby' or 'released'."""
    journal_records: int
    journal_overflow: bool
    last_recovery: Recovery | None

    def to_fields(self) -> dict[str, Any]:
        """As JSON-ready fields."""
        fields = asdict(self)
        fields["config_space"] = self.config_space.hex()
        return fields

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """From a reply. Raises `ControlProtocolError` when a field is missing or has no sense."""
        try:
            recovery = fields["last_recovery"]
            return cls(
                state=str(fields["state"]),
                owner=str(fields["owner"]),
                session=str(fields["session"]),
                verdicts={str(name): str(word) for name, word in fields["verdicts"].items()},
                device_connected=bool(fields["device_connected"]),
                vmm_connected=bool(fields["vmm_connected"]),
                lease=str(fields["lease"]),
                regions={
                    int(index): RegionDescription(int(region["flags"]), int(region["size"]))
                    for index, region in fields["regions"].items()
                },
                irqs={
                    int(index): IrqDescription(int(irq["flags"]), int(irq["count"]))
                    for index, irq in fields["irqs"].items()
                },
                config_space=bytes.fromhex(fields["config_space"]),
                identity=Identity(**fields["identity"]),
                supports=Supports(**fields["supports"]),
                layout_generation=int(fields["layout_generation"]),
                memory_pages=int(fields["memory_pages"]),
                dropped_writes=int(fields["dropped_writes"]),
                journal_records=int(fields["journal_records"]),
                journal_overflow=bool(fields["journal_overflow"]),
                last_recovery=None if recovery is None else Recovery(**recovery),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ControlProtocolError("the gateway's status does not parse") from error
