"""Capture and replay: register synchronisation for a device that offers nothing, by its profile.

Owns the course of the method on either side. The parts are `snapshot` (read, write, compare) and
`replay` (the guest's operations); `interface` says when each call comes.

    source                                             target
    probe: constants            -- OFFER ------------> the same constants?
    snapshot, journal begins    -- SNAPSHOT ---------> write, read back, compare
    the guest's operations      -- JOURNAL* ---------> replay
    [paused] read everything    -- FINAL, END -------> read everything, compare
                                                       start: what was held, all queues kicked
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

import numpy as np

from sync.registers.errors import (
    Difference,
    FeatureNotCarried,
    IdentityMismatch,
    JournalOverflow,
    PayloadError,
    RegisterError,
    RegisterMismatch,
    RestartRefused,
    SnapshotFailed,
)
from sync.registers.interface import (
    GatewayPort,
    Method,
    RegisterReport,
    SourceRegisters,
    TargetRegisters,
)
from sync.registers.payload import (
    MAX_WHOLE_BYTES,
    Assembler,
    PayloadKind,
    encode_json,
    split,
    take_number,
    with_number,
)
from sync.registers.profile.layout import Layout
from sync.registers.record import (
    NUMPY_FIELDS,
    RECORD_BYTES,
    STRUCT,
    Access,
    Flag,
    Op,
    RecordFormatError,
    pack_accesses,
    unpack_accesses,
)
from sync.registers.replay import Replayer
from sync.registers.snapshot import (
    ReadPlan,
    Values,
    carried_plan,
    compare,
    constants,
    deferred_plan,
    deferred_writes,
    final_plan,
    kicks,
    not_carried,
    probe_plan,
    restore_plan,
    snapshot_plan,
)

_TAKE_RECORDS = 8192
_TAKES = 64
"""Journal parts taken in one round: a guest that is faster than we are does not hold us up."""
_EXECUTE_BYTES = 4096 * RECORD_BYTES
"""Operations executed in one go on the target, so that its gateway stays responsive."""


class CaptureSource(SourceRegisters):
    """See `interface.SourceRegisters`. `offered` is what every method tells about the device."""

    method: ClassVar[Method] = "replay"
    capture: ClassVar[bool] = True
    fence: ClassVar[bool] = True

    def __init__(self, layout: Layout, port: GatewayPort, offered: dict[str, Any]) -> None:
        self._layout = layout
        self._port = port
        self._offered = offered
        self._probed: Values = {}
        self._next_seq = 0
        self._rest = b""
        self._captured = 0
        self._final = b""
        self._kicks = b""

    async def offer(self) -> bytes:
        await self._probe()
        await self._check_carried()
        found = constants(self._layout, self._probed)
        document = {**self._offered, "constants": _named(self._layout, found)}
        return encode_json(PayloadKind.OFFER, document)

    async def snapshot(self) -> bytes:
        await self._probe()
        return snapshot_plan(self._layout, self._probed).records()

    async def begin(self, values: bytes, journal_seq: int) -> AsyncIterator[bytes]:
        snapshot_plan(self._layout, self._probed).parse(values)
        self._next_seq = journal_seq
        for payload in split(PayloadKind.SNAPSHOT, with_number(journal_seq, values)):
            yield payload

    async def precopy(self) -> AsyncIterator[bytes]:
        try:
            async for payload in self._fetch():
                yield payload
        except JournalOverflow:
            # Operations are missing. Their outcome is in the registers.
            self._rest = b""
            recaptured = await self._port.recapture(await self.snapshot())
            async for payload in self.begin(*recaptured):
                yield payload

    async def _fetch(self) -> AsyncIterator[bytes]:
        """Payloads of the journal. Raises `JournalOverflow`."""
        for _ in range(_TAKES):
            records, overflow = await self._port.journal(_TAKE_RECORDS)
            if overflow:
                raise JournalOverflow(
                    "the guest used the device's registers faster than they could be sent: "
                    "try again, on a faster link or when the guest is less busy"
                )
            for payload in self._journal(records):
                yield payload
            if len(records) < _TAKE_RECORDS * RECORD_BYTES:
                return

    async def quiesce(self) -> None:
        # Once more: the guest may have reset its device and negotiated anew since.
        await self._check_carried()
        if self._layout.kicks:
            await self._read_final()

    def resume_records(self) -> bytes:
        return self._kicks

    async def final(self) -> AsyncIterator[bytes]:
        async for payload in self._fetch():
            yield payload
        if self._rest:
            raise RegisterError("the journal ends in the middle of an access")
        # Only now: what was under way when the VMM was paused has left its mark by now.
        await self._read_final()
        deferred = await self._port.batch(deferred_plan(self._layout).records())
        for kind, body in (
            (PayloadKind.FINAL, self._final),
            (PayloadKind.DEFERRED, deferred),
            (PayloadKind.END, with_number(self._next_seq)),
        ):
            for payload in split(kind, body):
                yield payload

    async def rollback(self) -> None:
        """The device was never told anything: there is nothing to undo."""

    def report(self) -> RegisterReport:
        return RegisterReport(method=self.method, captured=self._captured)

    async def _check_carried(self) -> None:
        """Raises `FeatureNotCarried` for what the driver has negotiated and no profile knows."""
        if not self._layout.profile.carried:
            return
        plan = carried_plan(self._layout, self._probed)
        found = not_carried(self._layout, plan.parse(await self._port.batch(plan.records())))
        if found:
            profile = self._layout.profile
            raise FeatureNotCarried(
                f"the guest uses {', '.join(found)} of device {self._layout.view.ids}, which "
                f"profile {profile.name} {profile.version} does not carry: have the device not "
                "offer it, and start the guest anew"
            )

    async def _probe(self) -> None:
        plan = probe_plan(self._layout)
        self._probed = plan.parse(await self._port.batch(plan.records()))

    async def _read_final(self) -> None:
        plan = final_plan(self._layout, self._probed)
        self._final = await self._port.batch(plan.records())
        self._kicks = pack_accesses(kicks(self._layout, plan.parse(self._final)))

    def _journal(self, records: bytes) -> Iterator[bytes]:
        # The gateway hands out records; where it cut an access in two, the parts go together.
        records = self._rest + records
        end = len(records)
        while end and _continues(records, end):
            end -= RECORD_BYTES
        self._rest = records[end:]
        if len(self._rest) > MAX_WHOLE_BYTES // 2:
            raise RegisterError("an access of the guest is too long to be carried over")
        for part in _parts(records[:end], MAX_WHOLE_BYTES // 2):
            self._next_seq += len(part) // RECORD_BYTES
            self._captured += _count(part)
            yield from split(PayloadKind.JOURNAL, part)


class CaptureTarget(TargetRegisters):
    """See `interface.TargetRegisters`. `offered` holds the constants of the source, by name."""

    method: ClassVar[Method] = "replay"

    def __init__(self, layout: Layout, port: GatewayPort, offered: dict[str, str]) -> None:
        self._layout = layout
        self._port = port
        self._offered = offered
        self._probed: Values = {}
        self._assembler = Assembler()
        self._replayer: Replayer | None = None
        self._final: Values | None = None
        self._deferred: Values | None = None
        self._differences: list[Difference] = []
        self._ended = False

    async def check(self) -> None:
        plan = probe_plan(self._layout)
        self._probed = plan.parse(await self._port.batch(plan.records()))
        here = _named(self._layout, constants(self._layout, self._probed))
        differences = [
            Difference(name, self._offered.get(name, "nothing"), here.get(name, "nothing"))
            for name in sorted(here.keys() | self._offered.keys())
            if here.get(name) != self._offered.get(name)
        ]
        if differences:
            raise IdentityMismatch("the target's device is not like the source's", differences)

    async def receive(self, payload: bytes) -> None:
        whole = self._assembler.add(payload)
        if whole is None:
            return
        kind, body = whole
        try:
            await self._apply(kind, body)
        except RecordFormatError as error:
            raise PayloadError(f"{kind.name} is malformed: {error}") from error

    async def finish(self) -> RegisterReport:
        if self._replayer is None or not self._ended or self._final is None:
            raise PayloadError("the source did not send all of the register state")
        if self._differences:
            raise RegisterMismatch("the registers differ", self._differences)
        counts = self._replayer.statistics
        # Nothing is read that would show whether they are equal all the same.
        doubtful = [
            Difference(place.name, "as the driver wrote it", "not (a write ended otherwise)")
            for place in self._layout.places
            if place.register.driver_only and place.name in counts.divergences
        ]
        if doubtful:
            raise RegisterMismatch("the registers may differ", doubtful)
        return RegisterReport(
            method=self.method,
            captured=counts.captured,
            replayed=counts.replayed,
            read_backs=counts.read_backs,
            held=counts.held,
            ignored=counts.ignored,
            divergences=dict(counts.divergences),
            compared=sum(self._layout.places[index].register.compare for index, _ in self._final),
            start_writes=len(self._replayer.start(self._final)),
        )

    def start_records(self) -> bytes:
        if self._replayer is None or self._final is None or self._deferred is None:
            raise PayloadError("the source did not send all of the register state")
        # First, for the guest's interrupt handler may run as soon as the device does.
        deferred = deferred_writes(self._layout, self._deferred)
        return pack_accesses([*deferred, *self._replayer.start(self._final)])

    async def _apply(self, kind: PayloadKind, body: bytes) -> None:
        replayer = self._replayer
        if kind is PayloadKind.SNAPSHOT and self._final is None:
            if replayer is not None:
                await self._reset()
            await self._restore(body)
        elif kind is PayloadKind.JOURNAL and replayer is not None and self._final is None:
            for part in _parts(body, _EXECUTE_BYTES):
                replay = replayer.feed(part)
                if replay.records:
                    replayer.executed(replay, await self._port.batch(replay.records))
        elif kind is PayloadKind.FINAL and replayer is not None and self._final is None:
            plan = final_plan(self._layout, self._probed)
            self._final = self._values(plan, body)
            self._differences = compare(self._layout, self._final, await self._read(plan))
        elif kind is PayloadKind.DEFERRED and self._final is not None and self._deferred is None:
            try:
                self._deferred = deferred_plan(self._layout).parse(body)
            except RegisterError as error:
                raise PayloadError(f"what the guest is owed is malformed: {error}") from error
        elif kind is PayloadKind.END and replayer is not None and self._deferred is not None:
            seq, rest = take_number(body)
            if rest or self._ended or seq != replayer.next_seq:
                raise PayloadError("the register state does not end where the source says")
            self._ended = True
        else:
            raise PayloadError(f"{kind.name} is not expected now")

    async def _reset(self) -> None:
        """For another snapshot: the source lost operations that this device has not executed."""
        results = await self._port.batch(pack_accesses([Access(Op.RESET, 0, 0, 0)]))
        (done,) = unpack_accesses(results)
        if done.failed:
            raise RestartRefused("the target's device cannot be reset for another snapshot")

    async def _restore(self, body: bytes) -> None:
        journal_seq, records = take_number(body)
        plan = snapshot_plan(self._layout, self._probed)
        values = self._values(plan, records)
        writes = restore_plan(self._layout, values)
        results = await self._port.batch(pack_accesses([access for access, _ in writes]))
        for (_, label), done in zip(writes, unpack_accesses(results), strict=True):
            if done.failed:
                raise RestartRefused(f"the target's device refused to write {label}")
        differences = compare(self._layout, values, await self._read(plan))
        if differences:
            raise RegisterMismatch("the target's device did not take its state", differences)
        self._replayer = Replayer(self._layout, journal_seq)

    def _values(self, plan: ReadPlan, records: bytes) -> Values:
        try:
            values = plan.parse(records)
        except SnapshotFailed as error:
            raise PayloadError(f"the source sent a reading that failed: {error}") from error
        except RecordFormatError:
            raise
        except RegisterError as error:
            raise PayloadError(f"the source sent a reading of something else: {error}") from error
        # They say how large the banks are: `check` has found them equal, and so they stay.
        if any(
            values[key] != value for key, value in constants(self._layout, self._probed).items()
        ):
            raise PayloadError("the source's constants are not those that it offered")
        return values

    async def _read(self, plan: ReadPlan) -> Values:
        return plan.parse(await self._port.batch(plan.records()))


def _named(layout: Layout, values: Values) -> dict[str, str]:
    return {
        layout.places[index].label(bank): value.hex() for (index, bank), value in values.items()
    }


def _continues(records: bytes, end: int) -> bool:
    """Whether the record before `end` is continued behind it."""
    flags: int = STRUCT.unpack_from(records, end - RECORD_BYTES)[-1]
    return bool(flags & Flag.MORE)


def _parts(records: bytes, part_bytes: int) -> Iterator[bytes]:
    """`records` in parts of about `part_bytes` that end with an access."""
    start = 0
    while start < len(records):
        end = min(start + part_bytes, len(records))
        while end < len(records) and _continues(records, end):
            end += RECORD_BYTES
        yield records[start:end]
        start = end


def _count(records: bytes) -> int:
    """How many accesses `records` hold."""
    flags = np.frombuffer(records, NUMPY_FIELDS)["flags"]
    return int(np.count_nonzero((flags & int(Flag.MORE)) == 0))
