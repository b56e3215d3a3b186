"""Going on with another process of a device that has died or is replaced.

Sans-IO. Owned here: the steps that bring a fresh device to where the guest's stood, as jobs for
`job_runner`, and the connection on which they are done beside the guest's (`Successor`). Not owned:
what is known of the guest's device (`keeper`), and what the VMM meets meanwhile (`away`).

    connect, ask everything -> the same device? -> reset -> memory and interrupts, as the VMM has
    them -> registers, as the driver wrote them -> requests that were under way are offered again
    -> start -> the VMM's commands go there
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sync.errors import SyncError
from sync.gateway.datapath.dma import AtDevice
from sync.gateway.datapath.relay import Relay, Send
from sync.gateway.engine import device_steps as steps
from sync.gateway.engine.device_handshake import DeviceFacts, handshake
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.job_runner import Call, Job, JobRunner
from sync.gateway.engine.keeper import Keeper, description, differences, identity, view_of
from sync.gateway.errors import AnotherDevice, DeviceRefused, DeviceTimeout, Unsupported
from sync.registers.errors import Difference, RegisterError, RegisterMismatch
from sync.registers.find import Origin, find_profile
from sync.registers.profile.layout import Layout
from sync.registers.record import pack_accesses, unpack_accesses
from sync.registers.snapshot import (
    Values,
    compare,
    deferred_plan,
    held_bits,
    kicks,
    not_carried,
    probe_plan,
    restore_plan,
    snapshot_plan,
)
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.protocol import Command, DmaUnmap, MigData, MigrationState

MAX_STREAM_BYTES = 64 << 20
"""A device's own state that is longer is not moved while the guest waits for its device."""
_PIECE_BYTES = 1 << 20
_SHOWN = 4


class Successor:
    """A device that is to take the place of the one on `link`: its own connection and jobs."""

    def __init__(
        self, link: DeviceLink, to_device: Send, clock: Callable[[], float], deadline_s: float
    ) -> None:
        self.facts = DeviceFacts()
        self.relay = Relay(to_device, clock)
        # What it does to guest memory before it is the guest's device is served alike.
        self.relay.device_command = link.service.handle
        self.runner = JobRunner(self.relay, clock, deadline_s)

    def close(self) -> None:
        self.relay.close()
        if self.facts.twin >= 0:
            os.close(self.facts.twin)
            self.facts.twin = -1


@dataclass(frozen=True, slots=True)
class Left:
    """The state of a device that came to rest: its own stream, or what its registers hold."""

    stream: bytes | None = None
    values: Values = field(default_factory=dict)


def see(link: DeviceLink, origins: Sequence[Origin]) -> Job[Keeper | None]:
    """What there is to keep of the device that has come; None: it could not be brought back, for no
    profile says how. Reads registers without a trace."""
    view = view_of(link.facts)
    profile = find_profile(view, origins)
    if profile is None or profile.comeback is None:
        return None
    layout = Layout(profile, view)
    values = yield from _read(link, layout)
    return Keeper(layout, link.memory, link.facts, values)


def see_again(link: DeviceLink) -> Job[None]:
    """The device was given its state by itself: its registers are read as they are."""
    keeper = link.keeper
    if keeper is None or not link.state_came:
        return
    link.state_came = False
    try:
        keeper.written.load((yield from _read(link, keeper.layout)))
    except RegisterError:
        # Nobody is worse off before the device dies: it does not come back then.
        keeper.written.too_much = True
    keeper.lose_track()


def come_back(link: DeviceLink, facts: DeviceFacts) -> Job[bool]:
    """A fresh device takes the place of the one that is gone; fills `facts`. False: what was under
    way is not known, and the guest's driver is told so by its device.

    Raises `AnotherDevice`, `DeviceRefused`, `RegisterError`; the device is of no use then.
    """
    keeper = link.keeper
    assert keeper is not None
    yield from handshake(facts)
    fresh = yield from _same_device(keeper, link, facts)
    told = yield from _share(link, -1)
    values = keeper.written.over(fresh)
    if keeper.written.too_much:
        raise RegisterError("the driver wrote to more registers than are kept")
    foreign = not_carried(keeper.layout, values)
    if foreign:
        raise RegisterError(f"the guest uses {', '.join(foreign)}, which the profile does not know")
    yield from _restore(link, values)
    known = keeper.offer_again()
    if known:
        start = keeper.written.start(values)
        yield from steps.execute(link, pack_accesses(start), note=False)
    while told != link.interrupts.revision or _untold(link):
        told = yield from _share(link, told)
    keeper.armed = True
    _owe(link, known)
    return known


# --- a device that is replaced while it works ---


def check_replaceable(link: DeviceLink) -> None:
    """Raises `Unsupported` if nothing tells the state of the device on `link`."""
    if link.keeper is None and not link.facts.supports.v2:
        raise Unsupported(
            "the device offers no VFIO migration v2, and no profile says how to replace it"
        )


def moves_natively(link: DeviceLink, facts: DeviceFacts) -> bool:
    """Whether both devices have a state stream."""
    return link.facts.supports.v2 and facts.supports.v2


def prepare(link: DeviceLink, facts: DeviceFacts) -> Job[Values]:
    """Asks a new device everything, and resets it; fills `facts`. Returns what its registers hold.

    Raises `AnotherDevice`, `DeviceRefused`, `Unsupported`.
    """
    yield from handshake(facts)
    if link.keeper is not None:
        return (yield from _same_device(link.keeper, link, facts))
    found = differences(description(link.facts), description(facts))
    if found:
        raise AnotherDevice(_told(found))
    if not facts.supports.v2:
        raise Unsupported("the new device offers no VFIO migration v2, as the guest's does")
    yield from _reset(facts)
    return {}


def leave(link: DeviceLink, native: bool, wanted: Callable[[], bool]) -> Job[Left]:
    """The device comes to rest; returns its state. What fails is undone, and so is all of it if it
    is not `wanted` any more by then."""
    try:
        left = (
            (yield from _leave_natively(link)) if native else (yield from _leave_by_profile(link))
        )
        if wanted():
            return left
    except ProtocolError:
        raise
    except SyncError:
        yield from stay(link, native)
        raise
    yield from stay(link, native)
    raise DeviceTimeout


def stay(link: DeviceLink, native: bool) -> Job[None]:
    """Undoes `leave`: the device goes on where it stood, with the memory that it does not have."""
    problem = yield from steps.share_and_run(link, run_device=native)
    if not native and link.keeper is not None:
        layout = link.keeper.layout
        values = yield from _read(link, layout)
        yield from steps.execute(link, pack_accesses(kicks(layout, values)), note=False)
    link.interrupts.fire_all()
    if problem is not None:
        raise problem


def arrive(link: DeviceLink, facts: DeviceFacts, left: Left) -> Job[None]:
    """A new device that `prepare` has reset goes on from where the other one has `left`."""
    for region in link.memory.regions:
        region.at_device = AtDevice.NOT
    if left.stream is not None:
        yield from _load(facts, left.stream)
    told = yield from _share(link, -1)
    if left.stream is not None:
        yield from steps.set_migration_state(MigrationState.RUNNING)
    else:
        keeper = link.keeper
        assert keeper is not None
        yield from _restore(link, left.values)
        here = yield from _read(link, keeper.layout)
        found = compare(keeper.layout, left.values, here)
        if found:
            raise RegisterMismatch("the new device did not take its state", found)
        # All of it was completed; but some devices put back what they had begun.
        keeper.offer_again()
        start = [*held_bits(keeper.layout, left.values), *kicks(keeper.layout, left.values)]
        results = yield from steps.execute(link, pack_accesses(start), note=False)
        if any(done.failed for done in unpack_accesses(results)):
            raise DeviceRefused("the new device refuses to be started")
    while told != link.interrupts.revision or _untold(link):
        told = yield from _share(link, told)


def _leave_natively(link: DeviceLink) -> Job[Left]:
    yield from steps.set_migration_state(MigrationState.STOP_COPY)
    size = min(link.facts.capabilities.max_data_xfer_size, _PIECE_BYTES)
    stream = bytearray()
    while True:
        (answer,) = yield [Call(Command.MIG_DATA_READ, MigData(size).pack())]
        data = MigData.unpack(answer.expect("to give its state")).data
        stream += data
        if len(data) < size:
            break
        if len(stream) > MAX_STREAM_BYTES:
            raise Unsupported(
                f"the device's state is longer than {MAX_STREAM_BYTES} bytes: too much to be moved "
                "while the guest waits"
            )
    return Left(stream=bytes(stream))


def _leave_by_profile(link: DeviceLink) -> Job[Left]:
    keeper = link.keeper
    assert keeper is not None
    yield from steps.unmap_all(link)
    values = yield from _read(link, keeper.layout)
    foreign = not_carried(keeper.layout, values)
    if foreign:
        raise Unsupported(f"the guest uses {', '.join(foreign)}, which the profile does not know")
    # The guest gets it with its next read, from whichever device.
    yield from steps.execute(link, deferred_plan(keeper.layout).records(), note=False)
    return Left(values=values)


def _load(facts: DeviceFacts, stream: bytes) -> Job[None]:
    yield from steps.set_migration_state(MigrationState.RESUMING)
    size = min(facts.capabilities.max_data_xfer_size, _PIECE_BYTES)
    for start in range(0, len(stream), size):
        part = stream[start : start + size]
        (answer,) = yield [Call(Command.MIG_DATA_WRITE, MigData(len(part), part).pack())]
        answer.expect("the state of the guest's device")
    yield from steps.set_migration_state(MigrationState.STOP)


def _reset(facts: DeviceFacts) -> Job[None]:
    if facts.supports.reset:
        (answer,) = yield [Call(Command.DEVICE_RESET)]
        answer.expect("a reset")


def go_on(link: DeviceLink, facts: DeviceFacts, stream: bytes, patience_s: float) -> Job[bool]:
    """As `come_back`, for a device whose next process takes a state `stream`. The handshake may
    take `patience_s` longer."""
    yield from handshake(facts, patience_s=patience_s)
    found = differences(description(link.facts), description(facts))
    if found:
        raise AnotherDevice(_told(found))
    if not facts.supports.v2:
        raise AnotherDevice("the device that came cannot be given a state, as the last one could")
    yield from _reset(facts)
    yield from arrive(link, facts, Left(stream=stream))
    return True


def _untold(link: DeviceLink) -> bool:
    """Whether the device does not know the memory that the VMM shares."""
    return bool(link.snoops.gone) or any(
        region.at_device is AtDevice.NOT for region in link.memory.regions
    )


def _share(link: DeviceLink, told: int) -> Job[int]:
    """Memory and interrupts, as the VMM has set them up; `told` is the interrupts' revision that
    the device knows, and what is returned."""
    while _untold(link):
        gone, link.snoops.gone = link.snoops.gone, []
        if gone:
            yield [Call(Command.DMA_UNMAP, DmaUnmap(0, *each).pack()) for each in gone]
        problem = yield from steps.share(link, AtDevice.DIRECT)
        if problem is not None:
            raise problem
    while told != link.interrupts.revision:
        told = link.interrupts.revision
        if not (yield from steps.assign_interrupts(link, tapped=False)):
            raise DeviceRefused("the device that came refuses the guest's interrupts")
    return told


def _same_device(keeper: Keeper, link: DeviceLink, facts: DeviceFacts) -> Job[Values]:
    """What the registers of the device hold after a reset, which it gets. Raises `AnotherDevice`
    before that if it is of another kind."""
    # What it says of itself, before anything is done to it.
    described = description(facts)
    _compare(keeper, described, {*described})
    try:
        layout = Layout(keeper.layout.profile, view_of(facts))
    except RegisterError as error:
        raise AnotherDevice(str(error)) from error
    yield from _reset(facts)
    fresh = yield from _read(link, layout)
    here = identity(layout, facts, fresh)
    _compare(keeper, here, here.keys() | keeper.identity.keys())
    return fresh


def _compare(keeper: Keeper, here: dict[str, str], names: set[str]) -> None:
    before = {name: value for name, value in keeper.identity.items() if name in names}
    found = differences(before, here)
    if found:
        raise AnotherDevice(_told(found))


def _told(found: list[Difference]) -> str:
    shown = (f"{each.name} was {each.source} and is {each.target}" for each in found[:_SHOWN])
    return f"the device that came is another one: {'; '.join(shown)}"


def _read(link: DeviceLink, layout: Layout) -> Job[Values]:
    plan = probe_plan(layout)
    probed = plan.parse((yield from steps.execute(link, plan.records(), note=False)))
    plan = snapshot_plan(layout, probed)
    return plan.parse((yield from steps.execute(link, plan.records(), note=False)))


def _restore(link: DeviceLink, values: Values) -> Job[None]:
    keeper = link.keeper
    assert keeper is not None
    writes = restore_plan(keeper.layout, values)
    records = pack_accesses([access for access, _ in writes])
    results = yield from steps.execute(link, records, note=False)
    for (_, label), done in zip(writes, unpack_accesses(results), strict=True):
        if done.failed:
            raise DeviceRefused(f"the device that came refuses to write {label}")


def _owe(link: DeviceLink, known: bool) -> None:
    """What the guest's driver could not read any more it reads next."""
    assert link.keeper is not None
    layout = link.keeper.layout
    comeback = layout.profile.comeback
    assert comeback is not None
    owed = [*comeback.owed, *(() if known else comeback.error)]
    for name, bits in owed:
        place = layout.place(name)
        if place is not None:
            link.deferred.add(place.region, place.offset, bits.to_bytes(place.size, "little"))
