"""The end of capture and replay, while the guest waits: what is read, compared, owed and rung."""

from types import SimpleNamespace

import pytest
from trio.testing import trio_test

from sync.registers.capture import CaptureSource
from sync.registers.errors import RegisterMismatch
from sync.registers.profile.layout import Layout
from sync.registers.record import Access, Op, unpack_accesses
from tests.sync.registers.pair import Pair, driver_only


@trio_test
async def test_registers_that_differ_at_the_end_are_named(model: SimpleNamespace) -> None:
    pair = Pair(model)
    await pair.begin()
    pair.target_device.queues[1]["ring"] = 5
    pair.target_device.values["control"] = 1
    await pair.switch()
    with pytest.raises(RegisterMismatch, match=r"ring\[1\]: 0x00000000 on the source") as caught:
        await pair.target.finish()
    assert [each.name for each in caught.value.differences] == ["ring[1]"]


@trio_test
async def test_what_only_the_driver_changes_is_not_read_again(model: SimpleNamespace) -> None:
    pair = Pair(model, driver_only(model, "block", "ring"))
    await pair.begin()
    pair.guest.do(Access(Op.WRITE, 0, 0x30, 8, bytes(range(8))))
    before = [len(gateway.executed) for gateway in (pair.source_gateway, pair.target_gateway)]
    await pair.switch()
    report = await pair.target.finish()
    for gateway, start in zip((pair.source_gateway, pair.target_gateway), before, strict=True):
        read = {access.offset for access in gateway.executed[start:] if access.op is Op.READ}
        assert {0x00, 0x0C, 0x18} <= read
        assert not read & {0x08, 0x30, 0x34, 0x38, 0x3C}
    assert report.compared == 5 + 2 * model.N_QUEUES
    assert pair.target_device.values["block"] == pair.source_device.values["block"] != 0


@trio_test
async def test_a_write_that_fails_on_the_target_alone_is_not_left_to_chance(
    model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a register that is not read again, nothing else would tell."""
    pair = Pair(model, driver_only(model, "block"))
    await pair.begin()
    pair.guest.do(Access(Op.WRITE, 0, 0x30, 8, bytes(range(8))))

    def refuse(*_: object) -> None:
        raise model.DeviceError

    with monkeypatch.context() as patched:
        patched.setattr(pair.target_device, "write", refuse)
        await pair.deliver(pair.source.precopy())
    await pair.switch()
    with pytest.raises(RegisterMismatch, match="block"):
        await pair.target.finish()


@trio_test
async def test_a_device_without_doorbells_to_ring_is_read_once_at_the_end(
    model: SimpleNamespace,
) -> None:
    text = model.PROFILE[: model.PROFILE.index("[[kick]]")]
    pair = Pair(model, text)
    await pair.begin()
    n_batches = len(pair.source_gateway.batches)
    await pair.source.quiesce()
    assert len(pair.source_gateway.batches) == n_batches
    assert pair.source.resume_records() == b""
    await pair.deliver(pair.source.final())
    await pair.target.finish()


@trio_test
async def test_operations_behind_the_last_reading_make_it_read_again(
    model: SimpleNamespace,
) -> None:
    pair = Pair(model)
    await pair.begin()
    await pair.source.quiesce()
    pair.guest.do(Access(Op.WRITE, 0, 0x18, 8, bytes(range(8))))
    await pair.deliver(pair.source.final())
    await pair.target.finish()


@trio_test
async def test_what_the_device_changes_until_it_is_at_rest_arrives(model: SimpleNamespace) -> None:
    """A device moves registers by itself, until its memory is taken away behind `quiesce`."""
    pair = Pair(model)
    await pair.begin()
    await pair.source.quiesce()
    pair.source_device.values["scratch"] = 0x1234
    await pair.deliver(pair.source.final())
    with pytest.raises(RegisterMismatch, match="scratch"):
        await pair.target.finish()


@trio_test
async def test_what_a_read_clears_is_owed_to_the_guest_on_the_target(
    model: SimpleNamespace,
) -> None:
    """The device is at rest only behind `quiesce`: what it left by then counts, too."""
    text = model.PROFILE.replace(
        'class = "read-to-clear"', 'class = "read-to-clear"\nowed = "bits"'
    )
    pair = Pair(model, text)
    await pair.begin()
    await pair.source.quiesce()
    pair.source_device.values["events"] = 0x81
    await pair.deliver(pair.source.final())
    await pair.target.finish()
    first, *others = unpack_accesses(pair.target.start_records())
    assert first.deferred
    assert first.op is Op.WRITE
    assert first.data == (0x81).to_bytes(4, "little")
    assert not first.counts
    assert not any(access.deferred for access in others)


@trio_test
async def test_what_counters_have_come_to_is_owed_one_by_one(model: SimpleNamespace) -> None:
    counters = 'class = "read-to-clear"\naccess = 2\nowed = "count"'
    pair = Pair(model, model.PROFILE.replace('class = "read-to-clear"', counters))
    await pair.begin()
    pair.source_device.values["events"] = 0x0007
    await pair.switch()
    await pair.target.finish()
    owed = [access for access in unpack_accesses(pair.target.start_records()) if access.deferred]
    assert owed == [Access(Op.WRITE, 0, 0x14, 2, b"\7\0", deferred=True, counts=True)]


@trio_test
async def test_i4_enabled_queues_are_kicked_behind_the_bits_that_start_dma(
    model: SimpleNamespace,
) -> None:
    pair = Pair(model)
    pair.guest.do(Access(Op.WRITE, 7, 0x04, 2, b"\6\0"))
    pair.guest.do(Access(Op.WRITE, 0, 0x00, 4, b"\1\0\0\7"))
    pair.source_device.queues[2]["enable"] = 1
    await pair.begin()
    pair.guest.do(Access(Op.WRITE, 0, 0x04, 2, b"\0\0"))
    pair.guest.do(Access(Op.WRITE, 0, 0x0C, 2, b"\1\0"))
    pair.guest.do(Access(Op.WRITE, 0, 0x44, 2, b"\5\0"))
    assert pair.source.resume_records() == b""
    await pair.switch()
    report = await pair.target.finish()
    assert pair.target_device.effects == []
    assert pair.target_device.values["control"] == 0x07000000
    await pair.start()
    assert pair.target_device.effects == [
        ("command", 6),
        ("control", 0x07000001),
        ("doorbell 0x44", 5),
        ("doorbell 0x40", 0),
        ("doorbell 0x48", 2),
    ]
    assert report.start_writes == 5


@trio_test
async def test_i8_the_source_starts_again_with_all_its_queues_kicked(
    model: SimpleNamespace,
) -> None:
    """A notification that the stopped device took in and did not follow is repeated."""
    layout = Layout(model.profile(), model.view())
    device = model.Device()
    device.queues[0]["enable"] = device.queues[2]["enable"] = 1
    gateway = model.Gateway(device)
    source = CaptureSource(layout, gateway, {})
    await source.offer()
    values = await gateway.batch(await source.snapshot())
    assert [payload async for payload in source.begin(values, 0)]
    await source.quiesce()
    await gateway.batch(source.resume_records())
    assert device.effects == [("doorbell 0x40", 0), ("doorbell 0x48", 2)]
