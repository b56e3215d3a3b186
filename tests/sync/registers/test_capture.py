"""Capture and replay from end to end, on model devices: the target becomes what the source is."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import trio_test

from sync.registers.capture import CaptureTarget
from sync.registers.errors import (
    IdentityMismatch,
    JournalOverflow,
    PayloadError,
    RefusedAccess,
    RegisterMismatch,
    RestartRefused,
    SequenceError,
    SnapshotFailed,
)
from sync.registers.payload import (
    Assembler,
    PayloadKind,
    decode_json,
    split,
    take_number,
    with_number,
)
from sync.registers.record import Access, Op, pack_accesses, unpack_accesses
from tests.sync.registers.pair import JOURNAL_SEQ, Pair, driver_only

model_settings = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@st.composite
def operations(draw: st.DrawFn) -> Access:
    """An access of a guest: mostly whole registers, sometimes anything at all."""
    region = draw(st.sampled_from([0, 0, 0, 7]))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return Access(Op.RESET, 0, 0, 0)
    if kind < 3:
        size = draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16]))
        offset = draw(st.integers(0, 0x100 - size))
    elif region == 7:
        offset, size = 4, draw(st.sampled_from([2, 4]))
    else:
        offset, size = draw(
            st.sampled_from(
                [
                    *[(0x00, 4), (0x04, 2), (0x08, 4), (0x0C, 2), (0x10, 4), (0x14, 4)],
                    *[(0x18, 8), (0x20, 4), (0x28, 4), (0x30, 8), (0x40, 2), (0x44, 2), (0xF8, 4)],
                ]
            )
        )
    if draw(st.booleans()):
        return Access(Op.READ, region, offset, size)
    if offset < 0x40 < offset + size:
        offset = 0x40
    if offset == 4 and region == 0:
        data = bytes([draw(st.integers(0, 4))]) + bytes(size - 1)
    else:
        data = draw(st.binary(min_size=size, max_size=size))
    return Access(Op.WRITE, region, offset, size, data)


@model_settings
@given(
    before=st.lists(operations(), max_size=20),
    rounds=st.lists(
        st.tuples(st.lists(operations(), max_size=15), st.sampled_from([False, False, True])),
        max_size=4,
    ),
    cause=st.integers(0, 0xFFFFFFFF),
    events=st.integers(0, 0xFFFFFFFF),
    read_again=st.booleans(),
)
def test_i4_the_target_becomes_what_the_source_is(
    model: SimpleNamespace,
    before: list[Access],
    rounds: list[tuple[list[Access], bool]],
    cause: int,
    events: int,
    read_again: bool,
) -> None:
    """Any operations of a guest: in the end every register is equal, and until the target owns
    the guest its device has had no outside effect. Whether or not what the driver alone changes
    is read again at the end."""

    async def main() -> None:
        pair = Pair(model, None if read_again else driver_only(model, "ring", "scratch", "block"))
        for access in before:
            pair.guest.do(access)
        # Bits that hardware sets are the same on both sides, as far as a replay is concerned.
        pair.source_device.values |= {"cause": cause, "events": events}
        untouched = pair.source_device.state()
        effects = list(pair.source_device.effects)
        await pair.prepare()
        snapshot = await pair.mediate()
        assert pair.source_device.state() == untouched
        assert pair.source_device.effects == effects
        await pair.deliver(snapshot)
        same = ("cause", "events", "mode", "counter")
        pair.target_device.values |= {name: untouched["values"][name] for name in same}
        captured = 0
        for operations, overflows in rounds:
            for access in operations:
                pair.guest.do(access)
            captured += len(operations)
            if overflows:
                pair.source_gateway.overflows()
            await pair.deliver(pair.source.precopy())
            if overflows:
                # What came before is part of the new snapshot.
                captured, now = 0, pair.source_device.values
                pair.target_device.values |= {name: now[name] for name in same}
        await pair.switch()
        report = await pair.target.finish()
        assert pair.target_device.effects == []
        assert report.captured == captured
        assert report.captured == (
            report.replayed + report.read_backs + report.held + report.ignored
        )
        assert not report.divergences
        await pair.start()
        assert pair.target_device.state() == pair.source_device.state()

    trio.run(main)


def doorbells(effects: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [effect for effect in effects if effect[0].startswith("doorbell")]


@model_settings
@given(
    rings=st.lists(st.tuples(st.sampled_from([0x40, 0x44, 0x48]), st.integers(0, 99)), max_size=12),
    cuts=st.sets(st.integers(0, 12)),
)
def test_i4_only_the_last_of_each_doorbell_is_rung_in_order(
    model: SimpleNamespace, rings: list[tuple[int, int]], cuts: set[int]
) -> None:
    async def main() -> None:
        pair = Pair(model)
        await pair.begin()
        for place, (offset, value) in enumerate(rings):
            pair.guest.do(Access(Op.WRITE, 0, offset, 2, value.to_bytes(2, "little")))
            if place in cuts:
                await pair.deliver(pair.source.precopy())
        await pair.switch()
        report = await pair.target.finish()
        assert report.held == len(rings)
        assert pair.target_device.effects == []
        await pair.start()
        last = dict(rings)
        order = [
            offset
            for place, (offset, _) in enumerate(rings)
            if offset not in {later for later, _ in rings[place + 1 :]}
        ]
        assert pair.target_device.effects == [
            (f"doorbell {offset:#x}", last[offset]) for offset in order
        ]

    trio.run(main)


@trio_test
async def test_i4_a_reset_makes_held_doorbells_void(model: SimpleNamespace) -> None:
    for reset in (
        Access(Op.RESET, 0, 0, 0),
        Access(Op.WRITE, 0, 0x24, 4, b"\1\0\0\0"),
        Access(Op.WRITE, 0, 0x20, 8, b"\0\0\0\0\1\0\0\0"),
    ):
        pair = Pair(model)
        await pair.begin()
        pair.guest.do(Access(Op.WRITE, 0, 0x40, 2, b"\1\0"))
        pair.guest.do(reset)
        pair.guest.do(Access(Op.WRITE, 0, 0x44, 2, b"\2\0"))
        await pair.switch()
        await pair.target.finish()
        await pair.start()
        assert pair.target_device.effects == [("doorbell 0x44", 2)]


@trio_test
async def test_i4_bits_are_held_back_of_a_write_to_a_part_of_a_register(
    model: SimpleNamespace,
) -> None:
    pair = Pair(model)
    await pair.begin()
    pair.guest.do(Access(Op.WRITE, 0, 0x01, 1, b"\7"))
    pair.guest.do(Access(Op.WRITE, 0, 0x02, 2, b"\1\7"))
    await pair.switch()
    await pair.target.finish()
    assert pair.target_device.values["control"] == 0x07000700
    assert pair.target_device.effects == []
    await pair.start()
    assert pair.target_device.effects == [("control", 0x07010700)]


@trio_test
async def test_the_selector_goes_back_to_where_the_guest_put_it_last(
    model: SimpleNamespace,
) -> None:
    """The guest moves it between the probe and the snapshot."""
    pair = Pair(model)
    await pair.prepare()
    records = await pair.source.snapshot()
    pair.source_device.values["select"] = 2
    await pair.source_gateway.batch(records)
    assert pair.source_device.values["select"] == 2


@trio_test
async def test_a_gateway_that_cannot_write_back_is_found_out(model: SimpleNamespace) -> None:
    pair = Pair(model)
    await pair.prepare()
    pair.source_gateway.writes_back = False
    records = await pair.source.snapshot()
    pair.source_device.values["select"] = 2
    values = await pair.source_gateway.batch(records)
    with pytest.raises(SnapshotFailed, match="select"):
        async for _ in pair.source.begin(values, 0):
            pass


@trio_test
async def test_a_device_of_another_build_is_found_before_anything_is_touched(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(model)
    offered = decode_json(PayloadKind.OFFER, await pair.source.offer())["constants"]
    assert offered == {"n_queues": "0300"}
    target = CaptureTarget(pair.layout, pair.target_gateway, {"n_queues": "0400"})
    before = pair.target_device.state()
    with pytest.raises(IdentityMismatch, match="n_queues: 0400 on the source, 0300"):
        await target.check()
    assert pair.target_device.state() == before
    with pytest.raises(IdentityMismatch, match="nothing"):
        await CaptureTarget(pair.layout, pair.target_gateway, {}).check()


@trio_test
async def test_a_target_that_does_not_take_its_state_is_refused_at_once(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(model)
    pair.source_device.values["scratch"] = 0x1122334455667788
    await pair.prepare()
    payloads = await pair.mediate()
    write = pair.target_device.set

    def stuck(name: str, value: int) -> None:
        write(name, value & 0xFF if name == "scratch" else value)

    monkeypatch.setattr(pair.target_device, "set", stuck)
    with pytest.raises(RegisterMismatch, match="scratch: 0x1122334455667788 on the source"):
        await pair.deliver(payloads)


@trio_test
async def test_a_write_that_the_target_refuses_is_named(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(model)
    await pair.prepare()
    payloads = await pair.mediate()

    def refuse(name: str, value: int) -> None:
        if name == "ring":
            raise model.DeviceError

    monkeypatch.setattr(pair.target_device, "set", refuse)
    with pytest.raises(RestartRefused, match=r"ring\[0\]"):
        await pair.deliver(payloads)


@trio_test
async def test_divergences_are_counted_by_register(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(model)
    await pair.begin()
    pair.source_device.values["events"] = 3
    pair.guest.do(Access(Op.READ, 0, 0x14, 4))
    pair.guest.do(Access(Op.READ, 0, 0x14, 4))
    pair.guest.do(Access(Op.WRITE, 0, 0x00, 4, b"\1\0\0\0"))
    # The bit that is held back reads otherwise on the target; that is no divergence.
    pair.guest.do(Access(Op.READ, 0, 0x00, 4))
    pair.guest.do(Access(Op.READ, 0, 0x02, 1))
    pair.guest.do(Access(Op.READ, 0, 0x18, 8))
    await pair.deliver(pair.source.precopy())
    failing = Access(Op.WRITE, 0, 0xF8, 4, b"\0\0\0\0")
    pair.guest.do(failing)
    await pair.deliver(pair.source.precopy())
    with monkeypatch.context() as patched:
        patched.setattr(pair.target_device, "write", lambda *_: None)
        pair.guest.do(failing)
        await pair.deliver(pair.source.precopy())
    await pair.switch()
    report = await pair.target.finish()
    assert report.divergences == {"events": 1, "region 0 offset 0xf8": 1}
    assert (report.read_backs, report.replayed, report.ignored) == (4, 3, 1)


@trio_test
async def test_an_overflowed_journal_ends_it_only_once_the_guest_is_paused(
    model: SimpleNamespace,
) -> None:
    pair = Pair(model)
    await pair.begin()
    pair.source_gateway.overflows()
    before = len(pair.target_gateway.executed)
    await pair.deliver(pair.source.precopy())
    # Or it would not take all of another snapshot.
    assert pair.target_gateway.executed[before].op is Op.RESET
    pair.source_gateway.overflows()
    with pytest.raises(JournalOverflow):
        await pair.switch()


@trio_test
async def test_an_access_that_the_gateway_hands_out_in_two_parts_stays_one(
    model: SimpleNamespace,
) -> None:
    pair = Pair(model)
    await pair.begin()
    pair.guest.do(Access(Op.WRITE, 0, 0x18, 24, bytes(range(24))))
    whole, pair.source_gateway.pending = pair.source_gateway.pending, b""
    for start in range(0, len(whole), 32):
        pair.source_gateway.pending = whole[start : start + 32]
        await pair.deliver(pair.source.precopy())
    assert pair.source.report().captured == 1
    await pair.switch()
    report = await pair.target.finish()
    assert (report.captured, report.replayed) == (1, 1)
    assert pair.target_device.values["scratch"] == int.from_bytes(bytes(range(8)), "little")


@trio_test
async def test_a_long_journal_is_executed_in_bounded_batches(model: SimpleNamespace) -> None:
    pair = Pair(model)
    await pair.begin()
    count = 20_000
    one = Access(Op.WRITE, 0, 0x18, 8, bytes(8))
    pair.source_gateway.pending = pack_accesses([one] * count, JOURNAL_SEQ)
    await pair.deliver(pair.source.precopy())
    await pair.switch()
    assert (await pair.target.finish()).replayed == count
    assert max(pair.target_gateway.batches) <= 4096


def journal(*accesses: Access, seq: int = JOURNAL_SEQ) -> list[bytes]:
    return list(split(PayloadKind.JOURNAL, pack_accesses(list(accesses), seq)))


WRITE = Access(Op.WRITE, 0, 0x20, 4, b"\1\2\3\4")


@trio_test
async def test_i4_a_gap_or_a_repetition_is_refused(model: SimpleNamespace) -> None:
    for numbers in ([JOURNAL_SEQ + 1], [JOURNAL_SEQ, JOURNAL_SEQ], [JOURNAL_SEQ - 1]):
        pair = Pair(model)
        await pair.begin()
        with pytest.raises(SequenceError, match="was expected"):
            for seq in numbers:
                await pair.deliver(journal(WRITE, seq=seq))


@pytest.mark.parametrize(
    "hostile",
    [
        Access(Op.WRITE, 0, 0x100, 1, b"\0"),
        Access(Op.WRITE, 0, 0xFF, 2, b"\0\0"),
        Access(Op.WRITE, 0, (1 << 64) - 1, 1, b"\0"),
        Access(Op.WRITE, 1, 0, 1, b"\0"),
        Access(Op.WRITE, 65535, 0, 1, b"\0"),
        Access(Op.READ, 7, 0x100, 8),
    ],
)
@trio_test
async def test_i9_an_operation_outside_the_device_is_refused(
    model: SimpleNamespace, hostile: Access
) -> None:
    pair = Pair(model)
    await pair.begin()
    executed = len(pair.target_gateway.executed)
    with pytest.raises(PayloadError, match="no sense"):
        await pair.deliver(journal(WRITE, hostile))
    assert len(pair.target_gateway.executed) == executed


@trio_test
async def test_i9_payloads_that_are_not_expected_are_refused(model: SimpleNamespace) -> None:
    pair = Pair(model)
    await pair.prepare()
    snapshot = await pair.mediate()
    final = [payload async for payload in pair.source.final()]
    for early in (journal(WRITE), final, list(split(PayloadKind.STATE, bytes(8)))):
        with pytest.raises(PayloadError):
            await pair.deliver(early)
    await pair.deliver(snapshot)
    with pytest.raises(PayloadError, match="did not send all"):
        await pair.target.finish()
    with pytest.raises(PayloadError, match="did not send all"):
        Pair(model).target = CaptureTarget(pair.layout, pair.target_gateway, {})
        Pair(model)
        CaptureTarget(pair.layout, pair.target_gateway, {}).start_records()
    with pytest.raises(PayloadError, match="END"):
        await pair.deliver(list(split(PayloadKind.END, with_number(JOURNAL_SEQ))))
    await pair.deliver(final[:-1])
    with pytest.raises(PayloadError, match="JOURNAL is not expected"):
        await pair.deliver(journal(WRITE))
    with pytest.raises(PayloadError, match="SNAPSHOT is not expected"):
        await pair.deliver(snapshot)
    with pytest.raises(PayloadError, match="does not end"):
        await pair.deliver(list(split(PayloadKind.END, with_number(JOURNAL_SEQ + 1))))
    await pair.deliver(final[-1:])
    assert (await pair.target.finish()).compared


@trio_test
async def test_i9_a_source_cannot_make_a_bank_larger_behind_our_back(
    model: SimpleNamespace,
) -> None:
    pair = Pair(model)
    await pair.prepare()
    whole = Assembler().add((await pair.mediate())[0])
    assert whole is not None
    accesses = [
        access._replace(data=b"\x40\0") if access[1:3] == (0, 6) else access
        for access in unpack_accesses(whole[1][8:])
    ]
    body = with_number(JOURNAL_SEQ, pack_accesses(accesses))
    with pytest.raises(PayloadError, match="constants are not those"):
        await pair.deliver(list(split(PayloadKind.SNAPSHOT, body)))


@model_settings
@given(data=st.data())
def test_i9_a_damaged_snapshot_never_raises_anything_but_our_errors(
    model: SimpleNamespace, data: st.DataObject
) -> None:
    async def main() -> None:
        pair = Pair(model)
        await pair.prepare()
        (payload,) = await pair.mediate()
        damaged = bytearray(payload)
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.sampled_from([len(damaged), len(damaged) - 32, len(damaged) // 2]))
        with suppress(PayloadError, RegisterMismatch, RestartRefused):
            await pair.target.receive(bytes(damaged[:cut]))

    trio.run(main)


@trio_test
async def test_writes_that_a_profile_refuses_end_it(model: SimpleNamespace) -> None:
    unlisted = Access(Op.WRITE, 0, 0x60, 4, b"\0\0\0\0")
    strict = model.PROFILE.replace('version = "1"', 'version = "1"\nunlisted = "refuse"')
    for access in (unlisted, Access(Op.WRITE, 0, 0x60, 16, bytes(16))):
        pair = Pair(model, strict)
        await pair.begin()
        with pytest.raises(RefusedAccess, match="0x60, unlisted"):
            await pair.deliver(journal(access))
    pair = Pair(model, model.PROFILE.replace('class = "ignore"', 'class = "refuse"'))
    await pair.begin()
    await pair.deliver(journal(Access(Op.READ, 0, 0x28, 4)))
    with pytest.raises(RefusedAccess, match="counter"):
        await pair.deliver(journal(Access(Op.WRITE, 0, 0x28, 4, bytes(4)), seq=JOURNAL_SEQ + 1))
    pair = Pair(model)
    await pair.begin()
    with pytest.raises(RefusedAccess, match="block and doorbells"):
        await pair.deliver(journal(Access(Op.WRITE, 0, 0x3C, 8, bytes(8))))
    lax = model.PROFILE.replace('version = "1"', 'version = "1"\nunlisted = "ignore"')
    pair = Pair(model, lax)
    await pair.begin()
    executed = len(pair.target_gateway.executed)
    await pair.deliver(journal(unlisted))
    assert len(pair.target_gateway.executed) == executed


@trio_test
async def test_the_payloads_are_what_the_interface_says(model: SimpleNamespace) -> None:
    pair = Pair(model)
    await pair.prepare()
    (snapshot,) = await pair.mediate()
    whole = Assembler().add(snapshot)
    assert whole is not None
    kind, body = whole
    assert kind is PayloadKind.SNAPSHOT
    seq, records = take_number(body)
    assert seq == JOURNAL_SEQ
    assert len(records) % 32 == 0
    assert (pair.source.method, pair.source.capture, pair.source.fence) == ("replay", True, True)
    await pair.source.rollback()
