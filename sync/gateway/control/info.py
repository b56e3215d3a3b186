"""What a gateway tells about itself: the shapes that cross the control socket in a status.

Not owned: their way to JSON and back (`shapes`), and what the states mean (`custody`).
"""

from dataclasses import dataclass

from sync.gateway.engine.custody import ClientRole, CustodyState, Owner
from sync.gateway.engine.records import Fate
from sync.pci import Identity


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
class Supports:
    """What the device offers for a migration."""

    v2: bool = False
    """VFIO migration v2 with at least STOP_COPY."""
    precopy: bool = False
    logging: bool = False
    """DMA logging: start, stop and report."""
    queues: bool = False
    """What it writes follows from what its guest tells it."""
    message: bool = True
    """Its DMA can be had to pass the gateway."""
    reset: bool = False


@dataclass(frozen=True, slots=True)
class VmmConnection:
    """Where the gateway listens for its VMM, and who has connected there.

    Numbers are 0 where they are not known. Process ids are those of the namespace
    `pid_namespace` (pid_namespaces(7)), the inode number of /proc/self/ns/pid.
    """

    path: str = ""
    """Of the listening socket, absolute."""
    device: int = 0
    inode: int = 0
    """Of the socket's file (stat(2))."""
    pid: int = 0
    """Of the process that has connected (SO_PEERCRED of unix(7)): the VMM, or what passed it the
    connection."""
    pid_namespace: int = 0


@dataclass(frozen=True, slots=True)
class Recovery:
    """How the last recovery of the VMM went that the gateway did by itself (I8)."""

    reason: str
    ok: bool
    message: str


@dataclass(frozen=True, slots=True)
class Activity:
    """What a guest that came has asked of the device here, and what the device did, until it first
    interrupted or some time had passed. Zeros where none came."""

    writes: int = 0
    """Of registers beside configuration space, as doorbells are."""
    refused: int = 0
    """Accesses that the device has answered with an error."""
    interrupts: int = 0
    vectors: int = 0
    """Of those that the guest has armed, how many are counted at present."""


@dataclass(frozen=True, slots=True)
class Upgraded:
    """Another process has taken the gateway's place."""

    pid: int


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """A gateway's status. The device's part is that of its last connection."""

    state: CustodyState
    owner: Owner
    session: str
    """The session of the ownership record, or ''."""
    sessions: dict[str, Fate]
    """The latest sessions and what became of them here, the latest last."""
    device_connected: bool
    device_absence: str
    """Why the guest's device is not there; '' if it is, or if no guest waits for it."""
    device_path: str
    """Where it reaches its device: a socket, or a function of the host."""
    device_option: str
    """The `--device` of its process, where the next gateway finds its device: another place after a
    replacement."""
    comebacks: int
    """How often another process of the device has taken its place for the VMM that is connected."""
    vmm_connected: bool
    vmm: VmmConnection
    lease: ClientRole | None
    """The role that holds the lease."""
    regions: dict[int, RegionDescription]
    irqs: dict[int, IrqDescription]
    config_space: bytes
    """As read when the device was connected: 256 bytes, 4096 of PCI Express, or nothing."""
    identity: Identity
    supports: Supports
    holds: dict[str, str]
    """What a device with queues told of what it is and holds, by name: the same on both sides."""
    pin_ns_per_page: float
    """What it takes to show the device a page of guest memory; 0 for a process, which maps it."""
    layout_generation: int
    """Goes up with each change of the memory map."""
    memory_pages: int
    """Pages of 4096 bytes in the regions with a descriptor."""
    dropped_writes: int
    """Register writes and resets of the VMM not executed, since the gateway last went to
    'standby' or 'released'."""
    journal_records: int
    journal_overflow: bool
    activity: Activity
    last_recovery: Recovery | None
