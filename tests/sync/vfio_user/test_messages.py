"""Every message: round trip, place of each field as the specification's tables have it, and what a
malformed body comes to."""

import contextlib
import struct
import tracemalloc
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.vfio_user.access import DmaAccess
from sync.vfio_user.protocol import (
    Capabilities,
    Command,
    DeviceInfo,
    DeviceInfoRequest,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureFlags,
    FeatureIndex,
    IrqInfo,
    IrqInfoRequest,
    IrqSet,
    LoggingControl,
    LoggingReport,
    MigData,
    MigrationFlags,
    MigrationState,
    MigState,
    ProtocolError,
    RegionAccess,
    RegionInfo,
    RegionInfoRequest,
    RegionIoFdsRequest,
    SetIrqs,
    TwinSocket,
    Version,
    WriteMulti,
    WriteMultiReply,
    encode_message,
)


class Packable(Protocol):
    def pack(self) -> bytes: ...


u16 = st.integers(0, (1 << 16) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
number = st.integers(1, (1 << 63) - 1)
data = st.binary(max_size=64)
spans = st.tuples(st.integers(0, 1 << 63), st.integers(1, 1 << 62))


def carrying(make: Any, *fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Accesses with data of `count` bytes, and accesses of any count without."""
    with_data = st.tuples(*fields, data).map(lambda t: make(*t[:-1], len(t[-1]), t[-1]))
    return with_data | st.builds(make, *fields, st.integers(0, 1 << 31))


set_irqs_flags = st.tuples(
    st.sampled_from([IrqSet.ACTION_MASK, IrqSet.ACTION_UNMASK, IrqSet.ACTION_TRIGGER]), u32, u32
)
all_set_irqs = st.one_of(
    set_irqs_flags.map(lambda t: SetIrqs(t[0] | IrqSet.DATA_NONE, t[1], 0, 0)),
    st.tuples(set_irqs_flags, st.integers(1, 1 << 20)).map(
        lambda t: SetIrqs(t[0][0] | IrqSet.DATA_EVENTFD, t[0][1], t[0][2], t[1])
    ),
    st.tuples(set_irqs_flags, st.binary(min_size=1, max_size=40)).map(
        lambda t: SetIrqs(t[0][0] | IrqSet.DATA_BOOL, t[0][1], t[0][2], len(t[1]), t[1])
    ),
)


@st.composite
def logging_reports(draw: st.DrawFn) -> LoggingReport:
    page_size = 1 << draw(st.integers(0, 20))
    pages = draw(st.integers(1, 200))
    length = pages * page_size - draw(st.integers(0, page_size - 1))
    iova = draw(st.integers(0, 1 << 62))
    if draw(st.booleans()):
        return LoggingReport(iova, length, page_size)
    bits = draw(st.integers(0, (1 << pages) - 1))
    return LoggingReport(iova, length, page_size, bits.to_bytes((pages + 63) // 64 * 8, "little"))


MESSAGES: dict[type, st.SearchStrategy[Any]] = {
    Version: st.builds(
        Version,
        u16,
        u16,
        st.builds(
            Capabilities,
            number,
            number,
            number,
            number,
            st.none() | st.builds(TwinSocket, st.booleans(), st.none() | number),
            st.booleans(),
        ),
    ),
    DmaMap: st.tuples(st.integers(0, 3), st.integers(0, 1 << 62), spans).map(
        lambda t: DmaMap(t[0], t[1], *t[2])
    ),
    DmaUnmap: spans.map(lambda t: DmaUnmap(0, *t)) | st.just(DmaUnmap(2, 0, 0)),
    DeviceInfoRequest: st.builds(DeviceInfoRequest, st.integers(16, 1 << 31)),
    DeviceInfo: st.builds(DeviceInfo, u32, u32, u32),
    RegionInfoRequest: st.builds(RegionInfoRequest, u32, st.integers(32, 1 << 31)),
    RegionInfo: st.builds(RegionInfo, u32, st.integers(0, 7), u64, u64),
    RegionIoFdsRequest: st.builds(RegionIoFdsRequest, u32, st.integers(16, 1 << 31)),
    IrqInfoRequest: st.builds(IrqInfoRequest, u32, st.integers(16, 1 << 31)),
    IrqInfo: st.builds(IrqInfo, u32, u32, u32),
    SetIrqs: all_set_irqs,
    RegionAccess: carrying(RegionAccess, u64, u32),
    DmaAccess: carrying(DmaAccess, st.integers(0, 1 << 63)),
    WriteMulti: st.lists(
        st.tuples(u64, u32, st.binary(max_size=8)).map(
            lambda t: RegionAccess(t[0], t[1], len(t[2]), t[2])
        ),
        max_size=5,
    ).map(lambda writes: WriteMulti(tuple(writes))),
    WriteMultiReply: st.builds(WriteMultiReply, u64),
    Feature: st.one_of(
        st.builds(Feature.get, u16, st.integers(0, 1 << 20), data),
        st.builds(Feature.set, u16, data),
        st.builds(Feature.probe, u16, st.sampled_from([0, FeatureFlags.GET, 3 << 16])),
    ),
    MigrationFlags: st.sampled_from([1, 3, 5, 7]).map(MigrationFlags),
    MigState: st.builds(
        MigState, st.sampled_from(MigrationState), st.integers(-(1 << 31), (1 << 31) - 1)
    ),
    LoggingControl: st.tuples(st.integers(0, 63), st.lists(spans, max_size=5)).map(
        lambda t: LoggingControl(1 << t[0], tuple(t[1]))
    ),
    LoggingReport: logging_reports(),
    MigData: carrying(MigData),
}
any_message = st.one_of(list(MESSAGES.values()))


@given(any_message)
def test_what_is_packed_unpacks_to_the_same(message: Any) -> None:
    body = message.pack()
    assert type(message).unpack(body) == message
    assert type(message).unpack(memoryview(body)) == message


@given(st.sampled_from(list(MESSAGES)), st.binary(max_size=200))
def test_i9_garbage_is_a_protocol_error_or_a_message(kind: Any, body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        kind.unpack(body)


@given(any_message, st.data())
def test_i9_damage_is_a_protocol_error_or_another_message(
    message: Any, choose: st.DataObject
) -> None:
    body = bytearray(message.pack())
    if choose.draw(st.booleans()):
        del body[choose.draw(st.integers(0, len(body))) :]
    for _ in range(choose.draw(st.integers(0, 3)) if body else 0):
        body[choose.draw(st.integers(0, len(body) - 1))] = choose.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        type(message).unpack(bytes(body))


@given(any_message, st.data())
def test_a_message_cut_short_never_passes_for_itself(message: Any, choose: st.DataObject) -> None:
    body = message.pack()
    cut = body[: choose.draw(st.integers(0, max(0, len(body) - 1)))]
    if isinstance(message, DmaAccess) and len(cut) == 12:
        return  # a write reply with the count that the specification gives it
    try:
        found = type(message).unpack(cut)
    except ProtocolError:
        return
    assert found != message or not body


# (message, length, {(offset, size): value}), offsets from the tables of the specification
LAYOUTS: list[tuple[Packable, int, dict[tuple[int, int], int]]] = [
    (
        DmaMap(3, 0x1000, 0x2000, 0x3000),
        32,
        {(0, 4): 32, (4, 4): 3, (8, 8): 0x1000, (16, 8): 0x2000, (24, 8): 0x3000},
    ),
    (DmaUnmap(0, 0x2000, 0x3000), 24, {(0, 4): 24, (4, 4): 0, (8, 8): 0x2000, (16, 8): 0x3000}),
    (DeviceInfo(3, 9, 5), 16, {(0, 4): 16, (4, 4): 3, (8, 4): 9, (12, 4): 5}),
    (RegionInfoRequest(7, 99), 32, {(0, 4): 99, (8, 4): 7}),
    (
        RegionInfo(2, 7, 0x10000, 0x5000),
        32,
        {(0, 4): 32, (4, 4): 7, (8, 4): 2, (12, 4): 0, (16, 8): 0x10000, (24, 8): 0x5000},
    ),
    (IrqInfo(2, 9, 33), 16, {(0, 4): 16, (4, 4): 9, (8, 4): 2, (12, 4): 33}),
    (
        SetIrqs(0x22, 2, 5, 3, b"\1\0\1"),
        23,
        {(0, 4): 23, (4, 4): 0x22, (8, 4): 2, (12, 4): 5, (16, 4): 3, (20, 3): 0x010001},
    ),
    (
        RegionAccess(0x44, 7, 2, b"\x34\x12"),
        18,
        {(0, 8): 0x44, (8, 4): 7, (12, 4): 2, (16, 2): 0x1234},
    ),
    (DmaAccess(0x44000, 2, b"\x34\x12"), 18, {(0, 8): 0x44000, (8, 8): 2, (16, 2): 0x1234}),
    (
        WriteMulti((RegionAccess(8, 1, 2, b"\x34\x12"), RegionAccess(16, 0, 8, b"\1" * 8))),
        56,
        {
            (0, 8): 2,
            (8, 8): 8,
            (16, 4): 1,
            (20, 4): 2,
            (24, 8): 0x1234,
            (32, 8): 16,
            (40, 4): 0,
            (44, 4): 8,
            (48, 8): 0x0101010101010101,
        },
    ),
    (WriteMultiReply(5), 8, {(0, 8): 5}),
    (Feature.get(8, 100, b"xy"), 10, {(0, 4): 108, (4, 4): 0x10008}),
    (Feature.set(2, b"\1\0"), 10, {(0, 4): 10, (4, 4): 0x20002, (8, 2): 1}),
    (Feature.probe(6, 1 << 17), 8, {(0, 4): 8, (4, 4): 0x60006}),
    (MigrationFlags(5), 8, {(0, 8): 5}),
    (MigState(MigrationState.PRE_COPY, 0), 8, {(0, 4): 6, (4, 4): 0}),
    (
        LoggingControl(4096, ((0x1000, 0x2000),)),
        32,
        {(0, 8): 4096, (8, 4): 1, (12, 4): 0, (16, 8): 0x1000, (24, 8): 0x2000},
    ),
    (
        LoggingReport(0x1000, 0x2000, 4096, b"\2" + bytes(7)),
        32,
        {(0, 8): 0x1000, (8, 8): 0x2000, (16, 8): 4096, (24, 8): 2},
    ),
    (MigData(2, b"\1\2"), 10, {(0, 4): 10, (4, 4): 2, (8, 2): 0x0201}),
    (MigData(50), 8, {(0, 4): 58, (4, 4): 50}),
]


@pytest.mark.parametrize(("message", "length", "fields"), LAYOUTS)
def test_fields_stand_where_the_specification_has_them(
    message: Packable, length: int, fields: dict[tuple[int, int], int]
) -> None:
    body = message.pack()
    assert len(body) == length
    for (offset, size), value in fields.items():
        assert int.from_bytes(body[offset : offset + size], "little") == value, offset


def test_header() -> None:
    plain = encode_message(0x1234, Command.REGION_READ, b"body")
    assert plain == bytes.fromhex("3412 0900 14000000 00000000 00000000") + b"body"
    posted = encode_message(1, Command.REGION_WRITE, no_reply=True)
    assert posted == bytes.fromhex("0100 0a00 10000000 10000000 00000000")
    error = encode_message(1, Command.DMA_MAP, reply=True, error=17)
    assert error == bytes.fromhex("0100 0200 10000000 21000000 11000000")
    for wrong in ({"error": 5}, {"error": 5, "reply": True, "body": b"x"}):
        with pytest.raises(ValueError, match="error"):
            encode_message(1, 1, **wrong)


def test_dma_write_replies_of_both_lengths() -> None:
    assert DmaAccess.unpack(struct.pack("<QI", 0x1000, 8)) == DmaAccess(0x1000, 8)
    assert DmaAccess.unpack(struct.pack("<QQ", 0x1000, 8)) == DmaAccess(0x1000, 8)


def test_a_migration_read_reply_may_be_padded() -> None:
    assert MigData.unpack(struct.pack("<II", 10, 2) + b"ab" + bytes(20)) == MigData(2, b"ab")


def test_qemu_counts_descriptors_in_the_argsz_of_set_irqs() -> None:
    body = struct.pack("<IIIII", 20 + 4, 0x24, 2, 0, 1)
    assert SetIrqs.unpack(body) == SetIrqs(0x24, 2, 0, 1)


def test_capabilities_of_a_region_are_passed_over() -> None:
    caps = struct.pack("<HHI", 3, 1, 40) + struct.pack("<HHIII", 2, 1, 0, 9, 8)
    body = struct.pack("<IIIIQQ", 56, 9, 1, 32, 4096, 0) + caps
    assert RegionInfo.unpack(body) == RegionInfo(1, 1, 4096)


HOSTILE: list[tuple[Any, bytes]] = [
    (WriteMulti, struct.pack("<Q", (1 << 64) - 1)),
    (WriteMulti, struct.pack("<QQII", 1, 0, 0, 9) + bytes(8)),
    (LoggingControl, struct.pack("<QII", 4096, (1 << 32) - 1, 0)),
    (LoggingControl, struct.pack("<QII", 3000, 0, 0)),
    (LoggingReport, struct.pack("<QQQ", 0, 4096, 0)),
    (LoggingReport, struct.pack("<QQQ", 4096, (1 << 64) - 1, 4096)),
    (LoggingReport, struct.pack("<QQQ", 0, 8192, 4096) + b"\4" + bytes(7)),
    (LoggingReport, struct.pack("<QQQ", 0, 8192, 4096) + bytes(16)),
    (MigData, struct.pack("<II", 8, (1 << 32) - 1)),
    (MigState, struct.pack("<II", 5, 0)),
    (MigState, struct.pack("<II", 99, 0)),
    (MigrationFlags, struct.pack("<Q", 4)),
    (RegionAccess, struct.pack("<QII", 0, 0, (1 << 32) - 1) + b"x"),
    (DmaAccess, struct.pack("<QQ", (1 << 64) - 1, 2)),
    (DmaMap, struct.pack("<IIQQQ", 32, 3, 0, (1 << 64) - 4096, 8192)),
    (DmaMap, struct.pack("<IIQQQ", 32, 3, (1 << 64) - 4096, 0, 8192)),
    (DmaMap, struct.pack("<IIQQQ", 32, 3, 0, 0, 0)),
    (DmaMap, struct.pack("<IIQQQ", 32, 4, 0, 0, 4096)),
    (DmaMap, struct.pack("<IIQQQ", 31, 3, 0, 0, 4096)),
    (DmaUnmap, struct.pack("<IIQQ", 24, 2, 4096, 4096)),
    (DmaUnmap, struct.pack("<IIQQ", 24, 1, 0, 0)),
    (DmaUnmap, struct.pack("<IIQQ", 8, 0, 0, 0)),
    (SetIrqs, struct.pack("<IIIII", 20, 0x22, 2, 0, (1 << 32) - 1)),
    (SetIrqs, struct.pack("<IIIII", 20, 0x21 | 0x40, 2, 0, 1)),
    (SetIrqs, struct.pack("<IIIII", 20, 0x23, 2, 0, 1)),
    (SetIrqs, struct.pack("<IIIII", 20, 0x31, 2, 0, 1)),
    (SetIrqs, struct.pack("<IIIII", 20, 0x20, 2, 0, 1)),
    (SetIrqs, struct.pack("<IIIII", 20, 0x24, 2, 0, 0)),
    (SetIrqs, struct.pack("<IIIII", 20, 0x21, 2, 1, 0)),
    (SetIrqs, struct.pack("<IIIII", 16, 0x21, 2, 0, 1)),
    (Feature, struct.pack("<II", 8, 3 << 16)),
    (Feature, struct.pack("<II", 8, 1)),
    (Feature, struct.pack("<II", 8, 1 << 19)),
    (Feature, struct.pack("<II", 7, 1 << 16)),
    (DeviceInfoRequest, struct.pack("<IIII", 15, 0, 0, 0)),
    (RegionInfoRequest, struct.pack("<IIIIQQ", 31, 0, 0, 0, 0, 0)),
    (IrqInfoRequest, struct.pack("<IIII", 0, 0, 0, 0)),
]


@pytest.mark.parametrize(("kind", "body"), HOSTILE)
def test_i9_hostile_bodies_are_refused_without_allocating(kind: Any, body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            kind.unpack(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 65536


def test_the_reply_bitmap_has_whole_words() -> None:
    assert LoggingReport(0, 64 * 4096, 4096).bitmap_bytes == 8
    assert LoggingReport(0, 64 * 4096 + 1, 4096).bitmap_bytes == 16


def test_a_multi_write_takes_no_more_than_eight_bytes() -> None:
    with pytest.raises(ValueError, match="8 bytes"):
        WriteMulti((RegionAccess(0, 0, 9, bytes(9)),)).pack()


def test_every_message_has_been_covered() -> None:
    assert {type(message) for message, _, _ in LAYOUTS} <= set(MESSAGES)
    assert FeatureIndex.DMA_LOGGING_REPORT.value == 8
