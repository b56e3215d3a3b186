"""What the gateway finds out about a device when it has connected to it, and how.

Owned here: the negotiation and the questions, as a job for `job_runner`. Nothing here changes the
device; every answer is checked. Source: vfio-user, "Connection Initiation" and the GET_ messages.
"""

from dataclasses import dataclass, field

from sync.gateway.control.info import IrqDescription, RegionDescription, Supports
from sync.gateway.datapath import dma
from sync.gateway.engine.job_runner import Call, Job
from sync.gateway.errors import DeviceRefused
from sync.pci import EXPRESS_CONFIG_BYTES, Identity
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.framing import MESSAGE_FDS_LIMIT, close_fds
from sync.vfio_user.protocol import (
    MAJOR,
    MINOR,
    Capabilities,
    Command,
    DeviceFlags,
    DeviceInfo,
    DeviceInfoRequest,
    Feature,
    FeatureFlags,
    FeatureIndex,
    IrqInfo,
    IrqInfoRequest,
    MigrationFlags,
    MigrationState,
    MigrationSupport,
    MigState,
    PciRegion,
    RegionAccess,
    RegionInfo,
    RegionInfoRequest,
    TwinSocket,
    Version,
)

MAX_DATA_BYTES = 1 << 20
"""What we can take in one transfer, from either side: the specification's default."""
MAX_REGIONS = 256
MAX_IRQS = 64

OFFER = Capabilities(
    max_msg_fds=MESSAGE_FDS_LIMIT,
    max_data_xfer_size=MAX_DATA_BYTES,
    max_dma_maps=dma.MAX_REGIONS,
    pgsizes=(1 << 63) - 4096,
    twin_socket=TwinSocket(supported=True),
    write_multiple=True,
)
"""What a device is offered: all that a VMM behind us could want, for it is asked before one comes.
The page sizes are every power of two from 4096 on."""


@dataclass(slots=True)
class DeviceFacts:
    """A device as it described itself. `twin` is our end of its own socket for commands, or -1."""

    minor: int = MINOR
    capabilities: Capabilities = field(default_factory=Capabilities)
    twin: int = -1
    flags: int = 0
    regions: dict[int, RegionDescription] = field(default_factory=dict)
    irqs: dict[int, IrqDescription] = field(default_factory=dict)
    supports: Supports = field(default_factory=Supports)
    config_space: bytes = b""
    holds: dict[str, str] = field(default_factory=dict)
    """What it told of what it is and holds, by name."""
    running: bool = True
    """False for a device that a migration has left stopped: it has to be set to RUNNING."""

    @property
    def identity(self) -> Identity:
        return Identity.from_config_space(self.config_space)


def handshake(facts: DeviceFacts, *, orphaned: bool = False, patience_s: float = 0.0) -> Job[None]:
    """Negotiates and fills `facts`. Raises `DeviceRefused`, `ProtocolError`.

    `patience_s`: how much longer than others the device may take for its first answer.

    `orphaned`: the VMM that used the device is gone. A device keeps its state when its client
    goes; what it had under way for one guest must not end up in the memory of the next.
    """
    yield from _negotiate(facts, patience_s)
    (answer,) = yield [Call(Command.DEVICE_GET_INFO, DeviceInfoRequest().pack())]
    device = DeviceInfo.unpack(answer.expect("DEVICE_GET_INFO"))
    facts.flags = device.flags
    if device.num_regions > MAX_REGIONS or device.num_irqs > MAX_IRQS:
        raise ProtocolError(f"{device.num_regions} regions and {device.num_irqs} interrupt types")
    answers = yield [
        Call(Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(index).pack())
        for index in range(device.num_regions)
    ]
    for index, answer in enumerate(answers):
        # A device may refuse to describe a region that it does not have.
        if not answer.error:
            region = RegionInfo.unpack(answer.body)
            facts.regions[index] = RegionDescription(region.flags, region.size)
    answers = yield [
        Call(Command.DEVICE_GET_IRQ_INFO, IrqInfoRequest(index).pack())
        for index in range(device.num_irqs)
    ]
    for index, answer in enumerate(answers):
        if not answer.error:
            irq = IrqInfo.unpack(answer.body)
            facts.irqs[index] = IrqDescription(irq.flags, irq.count)
    facts.supports = yield from _probe(bool(device.flags & DeviceFlags.RESET))
    if orphaned and facts.supports.reset:
        (answer,) = yield [Call(Command.DEVICE_RESET)]
        answer.expect("a reset")
    if facts.supports.v2:
        state = yield from get_migration_state()
        facts.running = state in (MigrationState.RUNNING, MigrationState.ERROR)
    facts.config_space = yield from _read_config(facts)


def get_migration_state() -> Job[MigrationState]:
    """The state that the device is in. Raises `DeviceRefused`."""
    request = Feature.get(FeatureIndex.MIG_DEVICE_STATE, len(MigState(MigrationState.STOP).pack()))
    (answer,) = yield [Call(Command.DEVICE_FEATURE, request.pack())]
    body = answer.expect("to tell its migration state")
    return MigState.unpack(Feature.unpack(body).data).device_state


def _negotiate(facts: DeviceFacts, patience_s: float) -> Job[None]:
    offer = Version(capabilities=OFFER).pack()
    (answer,) = yield [Call(Command.VERSION, offer, patience_s=patience_s)]
    version = Version.unpack(answer.expect("VERSION"))
    if version.major != MAJOR:
        raise ProtocolError(f"the device speaks version {version.major}.{version.minor}")
    facts.minor = min(version.minor, MINOR)
    facts.capabilities = version.capabilities
    twin = version.capabilities.twin_socket
    if twin is not None and twin.supported:
        if twin.fd_index is None or twin.fd_index >= len(answer.descriptors):
            raise ProtocolError("twin socket without a descriptor")
        facts.twin = answer.descriptors.pop(twin.fd_index)
    close_fds(answer.descriptors)


def _probe(reset: bool) -> Job[Supports]:
    logging = [
        (FeatureIndex.DMA_LOGGING_START, FeatureFlags.SET),
        (FeatureIndex.DMA_LOGGING_STOP, FeatureFlags.SET),
        (FeatureIndex.DMA_LOGGING_REPORT, FeatureFlags.GET),
    ]
    get = Feature.get(FeatureIndex.MIGRATION, len(MigrationFlags(0).pack()))
    migration, *probes = yield [
        Call(Command.DEVICE_FEATURE, get.pack()),
        *(
            Call(Command.DEVICE_FEATURE, Feature.probe(index, method).pack())
            for index, method in logging
        ),
    ]
    flags = 0
    if not migration.error:
        flags = MigrationFlags.unpack(Feature.unpack(migration.body).data).flags
    return Supports(
        v2=bool(flags & MigrationSupport.STOP_COPY),
        precopy=bool(flags & MigrationSupport.PRE_COPY),
        logging=not any(probe.error for probe in probes),
        reset=reset,
    )


def _read_config(facts: DeviceFacts) -> Job[bytes]:
    region = facts.regions.get(PciRegion.CONFIG)
    size = min(EXPRESS_CONFIG_BYTES, region.size if region else 0)
    if not size:
        return b""
    # Doublewords: the access that every configuration space takes (PCI 3.0, 6.1).
    answers = yield [
        Call(
            Command.REGION_READ,
            RegionAccess(offset, PciRegion.CONFIG, min(4, size - offset)).pack(),
        )
        for offset in range(0, size, 4)
    ]
    config = b""
    for answer in answers:
        if answer.error:
            raise DeviceRefused("the device does not let its configuration space be read")
        config += RegionAccess.unpack(answer.body).data
    if len(config) != size:
        raise ProtocolError("a configuration read is answered with too few bytes")
    return config
