"""What is done to a device on the way between states, in pieces that `jobs` puts together.

Sans-IO: each step is a generator that yields commands and is sent the answers (`job_runner`).
Source: vfio-user, VFIO_USER_DMA_MAP, _DMA_UNMAP, _REGION_READ/WRITE and _DEVICE_FEATURE.
"""

import os

from sync.errors import SyncError
from sync.gateway.datapath.bitmap import DirtyBitmap
from sync.gateway.datapath.dma import AtDevice, DmaRegion, FlatRegion
from sync.gateway.datapath.snoops import for_device
from sync.gateway.engine.device_handshake import get_migration_state
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.job_runner import Answer, Call, Job
from sync.gateway.engine.keeper import Keeper
from sync.gateway.errors import BadRequest, DeviceRefused
from sync.memory import PAGE_BYTES
from sync.registers.record import (
    STRUCT,
    Access,
    Flag,
    Op,
    RecordFormatError,
    unpack_accesses,
)
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.protocol import (
    Command,
    DmaUnmap,
    Feature,
    FeatureIndex,
    LoggingControl,
    LoggingReport,
    MigrationState,
    MigState,
    RegionAccess,
)

MAX_LOGGING_RANGES = 1024
"""More regions than this are logged as "everything"; libvfio-user and the kernel take as many."""
_REPORT_HEAD_BYTES = 64
"""Room for all but the bitmap in a report that has to stay below the transfer size."""
REPORT_PAGES = 1 << 19
"""A report on more guest pages (2 GiB) would hold the guest's accesses up for too long, here and in
the device: they are served between two reports."""


def unmap_all(link: DeviceLink) -> Job[None]:
    """Takes every region away from the device: when this is done it can do no DMA.

    Raises `DeviceRefused` if it keeps one; the others are gone by then.
    """
    regions = [r for r in link.memory.regions if r.at_device is not AtDevice.NOT]
    answers = yield [Call(Command.DMA_UNMAP, _unmapping(region)) for region in regions]
    refused: Answer | None = None
    for region, answer in zip(regions, answers, strict=True):
        if answer.error:
            refused = answer
        else:
            region.at_device = AtDevice.NOT
    if refused is not None:
        refused.expect("to let go of guest memory")


def share(link: DeviceLink, wanted: AtDevice) -> Job[SyncError | None]:
    """Has the device know every region as `wanted` (DIRECT or MESSAGE); returns what went wrong.

    A region without a descriptor is always DIRECT. Its two commands follow each other, so that the
    device is without a region for as short as can be; commands of the device are served meanwhile.
    """
    changes: list[tuple[DmaRegion, AtDevice, bool]] = []
    calls: list[Call] = []
    for region in link.memory.regions:
        kind = AtDevice.DIRECT if region.descriptor is None else wanted
        if region.at_device is kind:
            continue
        mapped = region.at_device is not AtDevice.NOT
        changes.append((region, kind, mapped))
        if mapped:
            calls.append(Call(Command.DMA_UNMAP, _unmapping(region)))
        else:
            # It may use the region before we have seen its answer.
            region.at_device = kind
        body = for_device(region.request, kind).pack()
        descriptor = region.descriptor if kind is AtDevice.DIRECT else None
        calls.append(Call(Command.DMA_MAP, body, descriptor))
    answers = iter((yield calls))
    problem: SyncError | None = None
    for region, kind, mapped in changes:
        unmap_error = next(answers).error if mapped else 0
        map_error = next(answers).error
        if not unmap_error:
            region.at_device = AtDevice.NOT if map_error else kind
        if unmap_error or map_error:
            problem = DeviceRefused(
                f"the device refuses guest memory at {region.address:#x} (errno "
                f"{unmap_error or map_error})"
            )
    return problem


def run(link: DeviceLink) -> Job[SyncError | None]:
    """Has a device with migration states be RUNNING; returns what went wrong."""
    try:
        state = yield from get_migration_state()
        if state is not MigrationState.RUNNING:
            yield from set_migration_state(MigrationState.RUNNING)
    except DeviceRefused as error:
        return error
    link.migration_touched = False
    return None


def share_and_run(link: DeviceLink, *, run_device: bool) -> Job[SyncError | None]:
    """Direct memory, then RUNNING; returns what went wrong.

    Some devices (libvfio-user) refuse a change of the map while they are stopped: then once more.
    """
    problem = yield from share(link, AtDevice.DIRECT)
    if not run_device:
        return problem
    trouble = yield from run(link)
    if problem is not None:
        problem = yield from share(link, AtDevice.DIRECT)
    return problem or trouble


def assign_interrupts(link: DeviceLink, *, tapped: bool) -> Job[bool]:
    """Has the device interrupt through us, where it is counted, or the VMM directly. Returns
    whether it took all of that; a vector that it does not give up interrupts as before."""
    link.interrupts.tapping = tapped
    requests = link.interrupts.reassign()
    calls = [
        Call(Command.DEVICE_SET_IRQS, request.pack(), descriptor)
        for request, descriptor in requests
    ]
    try:
        answers = yield calls
    finally:
        for _, descriptor in requests:
            os.close(descriptor)
    return not any(answer.error for answer in answers)


def set_migration_state(state: MigrationState) -> Job[None]:
    request = Feature.set(FeatureIndex.MIG_DEVICE_STATE, MigState(state).pack())
    (answer,) = yield [Call(Command.DEVICE_FEATURE, request.pack())]
    answer.expect(f"migration state {state.name}")


def start_logging(link: DeviceLink, layout: list[FlatRegion], page_bytes: int) -> Job[None]:
    """Has the device log its writes to `layout`; notes the page size that it chose."""
    ranges = tuple((region.iova, region.length) for region in layout)
    if len(ranges) > MAX_LOGGING_RANGES:
        ranges = ()
    control = LoggingControl(page_bytes, ranges)
    request = Feature.set(FeatureIndex.DMA_LOGGING_START, control.pack())
    (answer,) = yield [Call(Command.DEVICE_FEATURE, request.pack())]
    if answer.error:
        # A gateway that was killed may have left the device logging for it.
        _, answer = yield [_stop_logging(), Call(Command.DEVICE_FEATURE, request.pack())]
    data = Feature.unpack(answer.expect("DMA logging")).data
    # A device that has nothing to add may answer with the bare feature.
    link.logging_page_bytes = LoggingControl.unpack(data).page_size if data else page_bytes


def start_following(link: DeviceLink) -> None:
    """Has a device in our own process tell which pages its queues name."""
    if link.local is not None:
        link.local.start_tracking()
        link.tracking_queues = True


def stop_logging(link: DeviceLink) -> Job[None]:
    """Ends the logging; a device that refuses has none under way."""
    if link.tracking_queues and link.local is not None:
        link.local.stop_tracking()
        link.tracking_queues = False
    if link.logging_page_bytes:
        yield [_stop_logging()]
        link.logging_page_bytes = 0


def _stop_logging() -> Call:
    return Call(Command.DEVICE_FEATURE, Feature.set(FeatureIndex.DMA_LOGGING_STOP).pack())


def collect_log(link: DeviceLink) -> Job[bool]:
    """ORs what the device has logged into the bitmap; False if it would not tell all."""
    bitmap = link.service.bitmap
    assert bitmap is not None
    device_page = max(link.logging_page_bytes, PAGE_BYTES)
    limit = min(link.facts.capabilities.max_data_xfer_size, 1 << 20) - _REPORT_HEAD_BYTES
    complete = True
    for region in bitmap.layout:
        page = PAGE_BYTES if (region.iova | region.length) % device_page else device_page
        chunk = max(limit // 8, 1) * 64 * page
        if not link.stopped:
            chunk = min(chunk, REPORT_PAGES * PAGE_BYTES)
        chunk = max(chunk - chunk % device_page, device_page)
        for start in range(0, region.length, chunk):
            report = LoggingReport(region.iova + start, min(chunk, region.length - start), page)
            (answer,) = yield [_report_call(report)]
            if answer.error:
                complete = False
                continue
            given = LoggingReport.unpack(Feature.unpack(answer.body).data)
            asked = (report.iova, report.length, report.page_size)
            if (given.iova, given.length, given.page_size) != asked or not given.bitmap:
                raise ProtocolError("a report on other pages than those asked for")
            bitmap.merge(region, report.iova - region.iova, given.bitmap, page)
            _merge_edges(bitmap, given, device_page)
    return complete


def _merge_edges(bitmap: DirtyBitmap, report: LoggingReport, device_page: int) -> None:
    """Marks the whole of a device's page that lies only partly in the range of `report`.

    The device has cleared all of it, so what else is in it, of this region or another, counts as
    written, too.
    """
    last = (report.length - 1) // report.page_size
    for number in {0, last}:
        if report.bitmap[number >> 3] >> (number & 7) & 1:
            address = report.iova + number * report.page_size
            bitmap.mark(address - address % device_page, device_page)


def _report_call(report: LoggingReport) -> Call:
    data = report.pack()
    size = len(data) + report.bitmap_bytes
    request = Feature.get(FeatureIndex.DMA_LOGGING_REPORT, size, data)
    return Call(Command.DEVICE_FEATURE, request.pack())


def parse_records(link: DeviceLink, records: bytes) -> list[Access]:
    """The accesses in `records`. Raises `BadRequest` for what no device could be asked."""
    try:
        accesses = list(unpack_accesses(records))
    except RecordFormatError as error:
        raise BadRequest(str(error)) from error
    limit = link.facts.capabilities.max_data_xfer_size
    for access in accesses:
        if access.size > limit or access.offset + access.size > 1 << 64:
            raise BadRequest(f"an access of {access.size} bytes at {access.offset:#x}")
    return accesses


def execute(link: DeviceLink, records: bytes, *, note: bool = True) -> Job[bytes]:
    """Executes records in order; returns them with what was read (or written back) filled in, and
    `FAILED` where the device refused. `note`: they count as the driver's, for the device is the one
    that the guest has.

    A write back waits for the read that it depends on. What a read marked `DEFERRED` returns, the
    guest gets with its next read of that register; so it does what such a write, which is not
    executed, holds.
    """
    accesses = parse_records(link, records)
    first_read: dict[tuple[int, int, int], bytes] = {}
    outcomes: list[Access] = []
    while len(outcomes) < len(accesses):
        run: list[Access] = []
        awaited: set[tuple[int, int, int]] = set()
        for access in accesses[len(outcomes) :]:
            register = (access.region, access.offset, access.size)
            if access.deferred and access.op is Op.WRITE:
                if run:
                    break
                link.deferred.add(access.region, access.offset, access.data, count=access.counts)
                outcomes.append(access)
                continue
            if access.write_back:
                if register in awaited:
                    break
                access = access._replace(data=first_read.get(register, access.data))
            elif access.op is Op.READ and register not in first_read:
                awaited.add(register)
            if note and link.keeper is not None:
                _note(link.keeper, access)
            run.append(access)
        answers = (yield [_access_call(access) for access in run]) if run else []
        for access, answer in zip(run, answers, strict=True):
            data = access.data if answer.error else _outcome(access, answer)
            if access.op is Op.READ and not answer.error:
                first_read.setdefault((access.region, access.offset, access.size), data)
            if access.deferred and not answer.error:
                data = link.deferred.add(access.region, access.offset, data, count=access.counts)
            outcomes.append(access._replace(data=data, failed=bool(answer.error)))
    return _filled_in(records, outcomes)


def _note(keeper: Keeper, access: Access) -> None:
    if access.op is Op.WRITE:
        keeper.executed(access.region, access.offset, access.data)
    elif access.op is Op.RESET:
        keeper.reset()


def _filled_in(records: bytes, outcomes: list[Access]) -> bytes:
    out = bytearray(records)
    position = 0
    for outcome in outcomes:
        done = 0
        more = True
        while more:
            seq, offset, _, region, size, op, flags = STRUCT.unpack_from(out, position)
            value = int.from_bytes(outcome.data[done : done + size], "little")
            more = op != Op.RESET and bool(flags & Flag.MORE)
            flags = flags | Flag.FAILED if outcome.failed else flags & ~int(Flag.FAILED)
            STRUCT.pack_into(out, position, seq, offset, value, region, size, op, flags)
            position += STRUCT.size
            done += size
    return bytes(out)


def _access_call(access: Access) -> Call:
    if access.op is Op.RESET:
        return Call(Command.DEVICE_RESET)
    body = RegionAccess(access.offset, access.region, access.size).pack()
    if access.op is Op.READ:
        return Call(Command.REGION_READ, body)
    return Call(Command.REGION_WRITE, body + access.data)


def _outcome(access: Access, answer: Answer) -> bytes:
    if access.op is not Op.READ:
        return access.data
    data = RegionAccess.unpack(answer.body).data
    if len(data) != access.size:
        raise ProtocolError(f"a read of {access.size} bytes is answered with {len(data)}")
    return data


def _unmapping(region: DmaRegion) -> bytes:
    return DmaUnmap(0, region.address, region.request.size).pack()
