"""The device's own state stream, on a device that keeps to the rules of VFIO migration v2."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import trio_test

from sync.gateway.errors import DeviceRefused
from sync.registers.choose import source_for, target_for
from sync.registers.errors import PayloadError, RegisterError, RestartRefused, SequenceError
from sync.registers.payload import PayloadKind, split, with_number
from sync.registers.v2 import (
    CHUNK_BYTES,
    MAX_STREAM_BYTES,
    PRECOPY_BYTES,
    UNMEASURED_NS_PER_BYTE,
    StreamSource,
    StreamTarget,
)

STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = 1, 2, 3, 4, 6
NEXT = {
    RUNNING: {STOP, PRE_COPY, STOP_COPY, RESUMING},
    PRE_COPY: {RUNNING, STOP_COPY},
    STOP_COPY: {STOP, RUNNING},
    RESUMING: {STOP, RUNNING},
    STOP: {RUNNING, STOP_COPY, RESUMING},
}


class V2Device:
    """A device with a stream: what it has for PRE_COPY, then what it has for STOP_COPY."""

    def __init__(self, early: bytes = b"", late: bytes = b"") -> None:
        self.state = RUNNING
        self.history = [RUNNING]
        self.early, self.late = early, late
        self.written = b""
        self.rejects = False
        self.size: int | None = None

    async def mig_state(self, state: int) -> None:
        if state not in NEXT[self.state] or (self.rejects and state == STOP):
            raise DeviceRefused
        self.state = state
        self.history.append(state)

    async def mig_size(self) -> int | None:
        return self.size

    async def mig_read(self, max_bytes: int) -> bytes:
        assert self.state in (PRE_COPY, STOP_COPY)
        if self.state == STOP_COPY:
            self.early, self.late = b"", self.early + self.late
            chunk, self.late = self.late[:max_bytes], self.late[max_bytes:]
        else:
            chunk, self.early = self.early[:max_bytes], self.early[max_bytes:]
        return chunk

    async def mig_write(self, data: bytes) -> None:
        assert self.state == RESUMING
        self.written += data

    async def batch(self, records: bytes) -> bytes:
        raise AssertionError("not with this method")

    async def recapture(self, snapshot: bytes) -> tuple[bytes, int]:
        raise AssertionError("not with this method")

    async def journal(self, max_records: int = 0) -> tuple[bytes, bool]:
        raise AssertionError("not with this method")


async def listed(payloads: AsyncIterator[bytes]) -> list[bytes]:
    return [payload async for payload in payloads]


def halves(
    model: SimpleNamespace, source: V2Device, target: V2Device, precopy: bool
) -> tuple[StreamSource, StreamTarget]:
    near = source_for(model.view(v2=True, precopy=precopy), source, ())
    assert isinstance(near, StreamSource)
    assert (near.method, near.capture, near.fence) == ("v2", False, False)
    return near, StreamTarget(target)


@given(
    precopy=st.booleans(),
    early=st.integers(0, 3 * CHUNK_BYTES),
    more=st.integers(0, CHUNK_BYTES),
    late=st.integers(1, 3 * CHUNK_BYTES),
)
def test_i4_the_stream_arrives_whole_and_in_order(
    model: SimpleNamespace, precopy: bool, early: int, more: int, late: int
) -> None:
    content = bytes(range(251)) * ((early + more + late) // 251 + 1)

    async def main() -> None:
        source = V2Device(content[:early], content[early + more : early + more + late])
        target = V2Device()
        near, far = halves(model, source, target, precopy)
        offer = await near.offer()
        assert isinstance(target_for(offer, model.view(v2=True), target, ()), StreamTarget)
        assert await near.snapshot() == b""
        payloads = await listed(near.begin(b"", 0))
        source.early += content[early : early + more]
        payloads += await listed(near.precopy())
        assert (source.state == PRE_COPY) == precopy
        await near.quiesce()
        assert source.state == STOP_COPY
        payloads += await listed(near.final())
        await far.check()
        for payload in payloads:
            await far.receive(payload)
        report = await far.finish()
        assert target.written == content[: early + more + late]
        assert report.state_bytes == near.report().state_bytes == early + more + late
        assert target.history == [RUNNING, RESUMING, STOP]
        assert (await far.finish()) == report
        assert target.history == [RUNNING, RESUMING, STOP]
        assert (near.resume_records(), far.start_records()) == (b"", b"")

    trio.run(main)


@trio_test
async def test_i8_the_device_runs_again_after_a_rollback_in_any_phase(
    model: SimpleNamespace,
) -> None:
    for precopy in (False, True):
        for phases in range(4):
            source = V2Device(b"early", b"late")
            near, _ = halves(model, source, V2Device(), precopy)
            if phases > 0:
                await listed(near.begin(b"", 0))
            if phases > 1:
                await near.quiesce()
            if phases > 2:
                await listed(near.final())
            await near.rollback()
            assert source.state == RUNNING
            await near.rollback()
            assert source.state == RUNNING


@trio_test
async def test_i8_a_state_change_that_failed_half_way_is_rolled_back(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = V2Device()
    near, _ = halves(model, source, V2Device(), True)
    change = source.mig_state

    async def lost_answer(state: int) -> None:
        await change(state)
        raise trio.BrokenResourceError

    with monkeypatch.context() as patched:
        patched.setattr(source, "mig_state", lost_answer)
        with pytest.raises(trio.BrokenResourceError):
            await near.quiesce()
    assert source.state == STOP_COPY
    await near.rollback()
    assert source.state == RUNNING


@trio_test
async def test_a_device_that_always_has_more_does_not_hold_the_round_up(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = V2Device()
    near, _ = halves(model, source, V2Device(), True)

    async def endless(max_bytes: int) -> bytes:
        return bytes(max_bytes)

    monkeypatch.setattr(source, "mig_read", endless)
    await listed(near.begin(b"", 0))
    assert near.report().state_bytes == PRECOPY_BYTES
    await listed(near.precopy())
    assert near.report().state_bytes == 2 * PRECOPY_BYTES


@trio_test
async def test_a_device_that_does_not_accept_its_state_is_named(model: SimpleNamespace) -> None:
    target = V2Device()
    _, far = halves(model, V2Device(), target, False)
    for payload in (
        *split(PayloadKind.STATE, with_number(0, b"x")),
        *split(PayloadKind.END, with_number(1)),
    ):
        await far.receive(payload)
    target.rejects = True
    with pytest.raises(RestartRefused, match="does not accept its state"):
        await far.finish()


@trio_test
async def test_the_last_state_needs_a_device_at_rest(model: SimpleNamespace) -> None:
    near, _ = halves(model, V2Device(), V2Device(), False)
    with pytest.raises(RegisterError, match="at rest"):
        await listed(near.final())


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([(PayloadKind.STATE, 1, b"x")], SequenceError),
        ([(PayloadKind.STATE, 0, b"x"), (PayloadKind.STATE, 0, b"x")], SequenceError),
        ([(PayloadKind.STATE, 0, b"x"), (PayloadKind.STATE, 2, b"x")], SequenceError),
        ([(PayloadKind.STATE, 0, b"x"), (PayloadKind.END, 2, b"")], SequenceError),
        ([(PayloadKind.STATE, 0, b"x"), (PayloadKind.END, 1, b"x")], PayloadError),
        ([(PayloadKind.END, 0, b""), (PayloadKind.STATE, 0, b"x")], PayloadError),
        ([(PayloadKind.JOURNAL, 0, b"x")], PayloadError),
    ],
)
@trio_test
async def test_i4_a_gap_or_a_repetition_in_the_stream_is_refused(
    model: SimpleNamespace, sent: list[Any], error: type[Exception]
) -> None:
    target = V2Device()
    _, far = halves(model, V2Device(), target, False)
    with pytest.raises(error):
        for kind, position, data in sent:
            for payload in split(kind, with_number(position, data)):
                await far.receive(payload)
    assert target.written in (b"", b"x")


@trio_test
async def test_a_stream_that_is_not_complete_is_no_state(model: SimpleNamespace) -> None:
    for payloads in ([], list(split(PayloadKind.END, with_number(0)))):
        _, far = halves(model, V2Device(), V2Device(), False)
        for payload in payloads:
            await far.receive(payload)
        with pytest.raises(PayloadError, match="did not send all"):
            await far.finish()


@trio_test
async def test_what_is_left_is_what_the_device_tells_else_what_it_had_last(
    model: SimpleNamespace,
) -> None:
    source = V2Device(bytes(3 << 20))
    near, _ = halves(model, source, V2Device(), precopy=True)
    assert (await near.state_left()) == (0, UNMEASURED_NS_PER_BYTE)
    await listed(near.begin(b"", 0))
    left = await near.state_left()
    assert left is not None and left.bytes == 3 << 20 and left.ns_per_byte > 0
    assert left.ns_per_byte != UNMEASURED_NS_PER_BYTE
    source.early = bytes(1000)
    await listed(near.precopy())
    assert (await near.state_left() or left).bytes == 1000
    source.size = 256 << 20
    assert (await near.state_left() or left).bytes == 256 << 20
    source.size = MAX_STREAM_BYTES + 1
    with pytest.raises(RegisterError, match="can be moved"):
        await near.state_left()
    source.size = None
    secretive, _ = halves(model, source, V2Device(), precopy=False)
    assert await secretive.state_left() is None
