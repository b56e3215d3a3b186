"""What each request does to the device: one job for each, made of `device_steps`.

Sans-IO. Owned here: the order of the steps, the point at which the state changes, and the way back
when a step fails. Not owned: who may ask (`requests`), how a job is run (`job_runner`).

`mediate`, `passthrough`, `standby`, `start`, `stop`, `abandon` and `batch` run with the guest's
accesses held back. So the guest sees each of them as happening between two of its accesses.
"""

from sync.gateway.control.requests import DirtyHalf, Mediate, Mediation, Recaptured
from sync.gateway.datapath.bitmap import DirtyBitmap
from sync.gateway.datapath.dma import AtDevice
from sync.gateway.engine import comeback
from sync.gateway.engine import device_steps as steps
from sync.gateway.engine.custody import Custody, CustodyState
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.job_runner import Call, Job
from sync.gateway.engine.records import NO_TERMS, Terms
from sync.gateway.errors import BadRequest, GatewayError, Unsupported, WrongState
from sync.memory import PAGE_BYTES
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.protocol import (
    Command,
    DataSize,
    DeviceInfoRequest,
    Feature,
    FeatureIndex,
    IrqSet,
    MigData,
    MigrationState,
    PciIrq,
    SetIrqs,
)

STATE_PATIENCE_S = 30.0
"""A device may do more with its state than take it: its queues are walked as it arrives, while the
guest still runs elsewhere."""


def mediate(
    link: DeviceLink, custody: Custody, request: Mediate, session: str = ""
) -> Job[Mediation]:
    """passthrough -> mediated, for `session`. What fails is undone; the state is then what it was.

    The bitmap's descriptor stays the gateway's.
    """
    tracker = request.tracker
    custody.check_mediate()
    steps.parse_records(link, request.snapshot)
    bitmap = _new_bitmap(link) if tracker != "none" else None
    if tracker == "logging" and not link.facts.supports.logging:
        raise Unsupported("the device does not log its DMA writes: use another tracker")
    if tracker == "queues" and not link.facts.supports.queues:
        raise Unsupported("what the device writes does not follow from its queues: use another")
    if tracker == "message" and not link.facts.supports.message:
        raise Unsupported("the device's DMA cannot pass the gateway: use another tracker")
    if bitmap is not None:
        link.track(bitmap)
    try:
        if tracker == "logging" and bitmap is not None:
            yield from steps.start_logging(link, bitmap.layout, request.page_size)
        elif tracker == "queues":
            steps.start_following(link)
        elif tracker == "message":
            link.snoops.sharing = AtDevice.MESSAGE
            problem = yield from steps.share(link, AtDevice.MESSAGE)
            if problem is not None:
                raise problem
        values = yield from steps.execute(link, request.snapshot)
    except Exception:
        yield from steps.stop_logging(link)
        link.snoops.sharing = AtDevice.DIRECT
        yield from steps.share(link, AtDevice.DIRECT)
        link.untrack()
        raise
    link.journal.restart()
    link.capturing = request.capture
    custody.mediate(session, request.terms)
    link.enter(custody.state, shut=custody.shut)
    return Mediation(
        values=values,
        journal_seq=link.journal.next_seq,
        page_size=max(link.logging_page_bytes, PAGE_BYTES),
        dirty=(bitmap.descriptor,) if bitmap else (),
        n_pages=bitmap.n_pages if bitmap else 0,
        half_bytes=bitmap.half_bytes if bitmap else 0,
        layout_generation=link.memory.generation,
    )


def _new_bitmap(link: DeviceLink) -> DirtyBitmap:
    layout = link.memory.flat()
    if not layout:
        raise Unsupported("the guest has shared no memory with a descriptor: nothing to track")
    try:
        return DirtyBitmap(layout)
    except OSError as error:
        raise GatewayError(f"no room for the dirty bitmap: {error.strerror}") from error


def barrier() -> Job[None]:
    """Done when the device has done all that it was asked before: it answers in order."""
    yield [Call(Command.DEVICE_GET_INFO, DeviceInfoRequest().pack())]


def dirty(link: DeviceLink) -> Job[DirtyHalf]:
    """Reads and clears the tracker: what the device tells first, then the halves are swapped."""
    bitmap = link.service.bitmap
    if bitmap is None:
        raise WrongState("no tracker was asked for in 'mediate'")
    complete = True
    if link.tracking_queues and link.local is not None:
        bitmap.mark_pages(link.local.take_written())
    if link.logging_page_bytes:
        complete = yield from steps.collect_log(link)
    return DirtyHalf(bitmap.swap(), link.memory.generation, complete)


def recapture(link: DeviceLink, snapshot: bytes) -> Job[Recaptured]:
    """The journal begins anew, in one with a snapshot; it stays as it was if that fails."""
    values = yield from steps.execute(link, snapshot)
    link.journal.restart()
    return Recaptured(values, link.journal.next_seq)


def batch(link: DeviceLink, records: bytes) -> Job[bytes]:
    return (yield from steps.execute(link, records))


def stop(link: DeviceLink, custody: Custody, *, fence: bool, resume: bytes) -> Job[None]:
    """mediated -> stopped. If a fence fails, the state stays and `passthrough` gives all back."""
    custody.check_stop()
    steps.parse_records(link, resume)
    if fence:
        link.snoops.sharing = AtDevice.NOT
        yield from steps.unmap_all(link)
    custody.stop()
    link.resume_records = resume
    link.enter(custody.state, shut=custody.shut)


def restore(link: DeviceLink, custody: Custody) -> Job[None]:
    """mediated | stopped -> passthrough. Everything is tried; what failed first is raised then."""
    custody.check_restore()
    if custody.state is CustodyState.PASSTHROUGH:
        return
    was_stopped = custody.state is CustodyState.STOPPED
    yield from steps.stop_logging(link)
    link.snoops.sharing = AtDevice.DIRECT
    problem = yield from steps.share_and_run(link, run_device=link.migration_touched)
    if was_stopped:
        try:
            yield from steps.execute(link, link.resume_records)
        except BadRequest as error:
            problem = problem or error
    if link.snoops.unmask_pending:
        unmask = SetIrqs(IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK, PciIrq.INTX, 0, 1)
        yield [Call(Command.DEVICE_SET_IRQS, unmask.pack())]
    link.untrack()
    custody.restore()
    link.enter(custody.state, shut=custody.shut)
    if was_stopped:
        link.interrupts.fire_all()
    if problem is not None:
        raise problem


def standby(link: DeviceLink, custody: Custody, session: str, terms: Terms = NO_TERMS) -> Job[None]:
    """passthrough | released -> standby. What fails is undone; the state is then what it was."""
    custody.check_standby(session)
    shut = custody.shut
    link.snoops.sharing = AtDevice.NOT
    try:
        yield from steps.unmap_all(link)
        if link.facts.supports.reset:
            yield from reset_device(link)
        yield from steps.assign_interrupts(link, tapped=True)
        custody.standby(session, terms)
        link.state_came = False
    except Exception:
        if not shut:
            link.snoops.sharing = AtDevice.DIRECT
            yield from steps.share(link, AtDevice.DIRECT)
        raise
    link.enter(custody.state, shut=custody.shut)


def start(link: DeviceLink, custody: Custody, records: bytes) -> Job[None]:
    """standby -> passthrough, once the guest is owned. Can be asked for again if it fails.

    Before the device is let near the guest's memory, it is on record that the guest may have run.
    """
    custody.check_start()
    steps.parse_records(link, records)
    custody.about_to_run()
    link.watch.writes = link.watch.refused = link.interrupts.arrived = 0
    link.watched_since = link.clock()
    problem = yield from steps.share_and_run(link, run_device=link.facts.supports.v2)
    if problem is not None:
        raise problem
    yield from steps.execute(link, link.start_records + records)
    yield from comeback.see_again(link)
    custody.start()
    link.enter(custody.state, shut=custody.shut)
    link.interrupts.fire_all()


def end_watch(link: DeviceLink, custody: Custody) -> Job[None]:
    """Has the device interrupt the VMM directly again, as without a migration."""
    if (yield from steps.assign_interrupts(link, tapped=False)):
        link.interrupts.close_taps()
        link.interrupts.fire_all()
    if custody.state is CustodyState.PASSTHROUGH:
        link.enter(custody.state, shut=custody.shut)


def abandon(link: DeviceLink, custody: Custody) -> Job[None]:
    """standby -> without the guest: the device is as after a reset, and stays without memory, for
    the VMM here may hold a guest that runs elsewhere."""
    custody.check_abandon()
    if custody.state is CustodyState.STANDBY and link.facts.supports.reset:
        (answer,) = yield [Call(Command.DEVICE_RESET)]
        link.migration_touched = link.migration_touched and bool(answer.error)
        if link.keeper is not None:
            link.keeper.reset()
    custody.abandon()
    link.enter(custody.state, shut=custody.shut)


def reset_device(link: DeviceLink) -> Job[None]:
    (answer,) = yield [Call(Command.DEVICE_RESET)]
    answer.expect("a reset")
    if link.keeper is not None:
        link.keeper.reset()


def set_migration_state(link: DeviceLink, state: MigrationState) -> Job[None]:
    _require_v2(link)
    link.migration_touched = True
    yield from steps.set_migration_state(state)


def state_size(link: DeviceLink) -> Job[int | None]:
    """How many bytes of state the device estimates to have; None if it does not tell."""
    _require_v2(link)
    request = Feature.get(FeatureIndex.MIG_DATA_SIZE, len(DataSize(0).pack()))
    (answer,) = yield [Call(Command.DEVICE_FEATURE, request.pack())]
    return None if answer.error else DataSize.unpack(Feature.unpack(answer.body).data).length


def read_migration_data(link: DeviceLink, max_bytes: int) -> Job[bytes]:
    """Up to `max_bytes` of device state; less when the device has no more now."""
    _require_v2(link)
    parts: list[bytes] = []
    left = max_bytes
    while left:
        size = min(left, _transfer_bytes(link))
        (answer,) = yield [Call(Command.MIG_DATA_READ, MigData(size).pack())]
        data = MigData.unpack(answer.expect("to give device state")).data
        if len(data) > size:
            raise ProtocolError("more migration data than was asked for")
        parts.append(data)
        left -= len(data)
        if len(data) < size:
            break
    return b"".join(parts)


def write_migration_data(link: DeviceLink, data: bytes) -> Job[None]:
    _require_v2(link)
    link.state_came = True
    size = _transfer_bytes(link)
    for start in range(0, len(data), size):
        part = data[start : start + size]
        body = MigData(len(part), part).pack()
        (answer,) = yield [Call(Command.MIG_DATA_WRITE, body, patience_s=STATE_PATIENCE_S)]
        answer.expect("the device state")


def _require_v2(link: DeviceLink) -> None:
    if not link.facts.supports.v2:
        raise Unsupported("the device has no migration states (VFIO migration v2)")


def _transfer_bytes(link: DeviceLink) -> int:
    return min(link.facts.capabilities.max_data_xfer_size, 1 << 20)
