"""Every request at a served device: what the device sees, what comes back, what is refused and how.

A raw socket asks, so that replies are checked byte by byte and mistakes can be made.
"""

import os
import struct
from collections.abc import Callable
from errno import EACCES, EEXIST, EINVAL, EIO, ENOENT, ENOSPC, ENOTSUP, EPERM
from pathlib import Path
from typing import Any

import pytest

from lab.vfio_user.client import Client
from sync.vfio_user.protocol import (
    Capabilities,
    Command,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureIndex,
    IrqInfo,
    IrqSet,
    LoggingControl,
    LoggingReport,
    MigData,
    MigrationState,
    MigState,
    RegionAccess,
    RegionInfo,
    RegionInfoRequest,
    RegionIoFdsRequest,
    SetIrqs,
    Version,
    VfioUserError,
    WriteMulti,
    WriteMultiReply,
)

PAGE = 4096


@pytest.fixture
def peer(connect_raw: Callable[[], Any]) -> Any:
    peer = connect_raw()
    body = Version(capabilities=Capabilities(max_msg_fds=4, write_multiple=True)).pack()
    assert peer.ask(Command.VERSION, body)[0] == 0
    return peer


def test_descriptions(peer: Any) -> None:
    errno, body = peer.ask(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))
    assert (errno, DeviceInfo.unpack(body)) == (0, DeviceInfo(3, 9, 5))
    errno, body = peer.ask(Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 2, 0))
    assert (errno, IrqInfo.unpack(body)) == (0, IrqInfo(2, 1, 4))
    errno, body = peer.ask(Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(1).pack())
    assert (errno, RegionInfo.unpack(body)) == (0, RegionInfo(1, 1, 4096))


def test_no_part_of_a_region_is_told_of_by_a_descriptor(peer: Any) -> None:
    errno, body = peer.ask(Command.DEVICE_GET_REGION_IO_FDS, RegionIoFdsRequest(2, 96).pack())
    assert (errno, body) == (0, struct.pack("<IIII", 16, 0, 2, 0))


def test_region_access(peer: Any, device: Any) -> None:
    write = RegionAccess(8, 0, 4, b"abcd")
    assert peer.ask(Command.REGION_WRITE, write.pack()) == (0, RegionAccess(8, 0, 4).pack())
    assert peer.ask(Command.REGION_READ, RegionAccess(8, 0, 4).pack()) == (0, write.pack())
    assert peer.ask(Command.REGION_READ, RegionAccess(9, 0, 0).pack()) == (
        0,
        RegionAccess(9, 0, 0).pack(),
    )
    assert device.events == [("write", 0, 8, b"abcd"), ("read", 0, 8, 4)]


def test_posted_writes_are_executed_in_order_and_not_answered(peer: Any, device: Any) -> None:
    for value in range(3):
        peer.request(Command.REGION_WRITE, RegionAccess(0, 0, 1, bytes([value])).pack(), flags=0x10)
    peer.request(Command.REGION_WRITE, RegionAccess(0, 99, 1, b"x").pack(), flags=0x10)
    assert peer.ask(Command.REGION_READ, RegionAccess(0, 0, 1).pack())[1][16:] == b"\2"
    assert [event[3] for event in device.events if event[0] == "write"] == [b"\0", b"\1", b"\2"]


def test_write_multi(peer: Any, device: Any) -> None:
    writes = (RegionAccess(0, 0, 2, b"ab"), RegionAccess(2, 0, 8, b"cdefghij"))
    errno, body = peer.ask(Command.REGION_WRITE_MULTI, WriteMulti(writes).pack())
    assert (errno, body) == (0, WriteMultiReply(2).pack())
    assert device.registers[:10] == b"abcdefghij"
    bad = RegionAccess(0, 1, 1, b"x")
    errno, body = peer.ask(Command.REGION_WRITE_MULTI, WriteMulti((writes[0], bad)).pack())
    assert (errno, body) == (0, WriteMultiReply(1).pack())
    assert peer.ask(Command.REGION_WRITE_MULTI, WriteMulti((bad,)).pack()) == (EPERM, b"")


def test_write_multi_has_to_be_agreed_on(connect_raw: Callable[[], Any]) -> None:
    peer = connect_raw()
    peer.greet()
    assert peer.ask(Command.REGION_WRITE_MULTI, WriteMulti(()).pack()) == (ENOTSUP, b"")


BAD_REQUESTS = [
    (0, b"", ENOTSUP),
    (14, b"", ENOTSUP),
    (65535, b"", ENOTSUP),
    (Command.DMA_READ, struct.pack("<QQ", 0, 4), ENOTSUP),
    (Command.VERSION, Version().pack(), ENOTSUP),
    (Command.DEVICE_GET_INFO, b"", EINVAL),
    (Command.DEVICE_GET_INFO, struct.pack("<IIII", 8, 0, 0, 0), EINVAL),
    (Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(9).pack(), EINVAL),
    (Command.DEVICE_GET_REGION_IO_FDS, RegionIoFdsRequest(9).pack(), EINVAL),
    (Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 5, 0), EINVAL),
    (Command.REGION_READ, RegionAccess(0, 0, 4).pack()[:-1], EINVAL),
    (Command.REGION_READ, RegionAccess(0, 0, 4, b"abcd").pack(), EINVAL),
    (Command.REGION_READ, RegionAccess(0, 9, 4).pack(), EINVAL),
    (Command.REGION_READ, RegionAccess(0, 3, 4).pack(), EINVAL),
    (Command.REGION_READ, RegionAccess(4093, 0, 4).pack(), EINVAL),
    (Command.REGION_READ, RegionAccess((1 << 64) - 1, 0, 4).pack(), EINVAL),
    (Command.REGION_READ, RegionAccess(0, 0, (1 << 32) - 1).pack(), EINVAL),
    (Command.REGION_WRITE, RegionAccess(0, 0, 4).pack(), EINVAL),
    (Command.REGION_WRITE, RegionAccess(0, 0, 4, b"abc").pack(), EINVAL),
    (Command.REGION_WRITE, RegionAccess(0, 1, 4, b"abcd").pack(), EPERM),
    (Command.DEVICE_RESET, b"x", EINVAL),
    (Command.DEVICE_SET_IRQS, SetIrqs(0x21, 5, 0, 0).pack(), EINVAL),
    (Command.DEVICE_SET_IRQS, SetIrqs(0x21, 2, 0, 5).pack(), EINVAL),
    (Command.DEVICE_SET_IRQS, SetIrqs(0x21, 2, (1 << 32) - 1, 2).pack(), EINVAL),
    (Command.DMA_MAP, DmaMap(3, 0, 0x800, PAGE).pack(), EINVAL),
    (Command.DMA_UNMAP, DmaUnmap(0, 0, PAGE).pack(), ENOENT),
    (Command.DEVICE_FEATURE, struct.pack("<II", 8, 0), EINVAL),
    (Command.MIG_DATA_READ, MigData((1 << 20) + 1).pack(), EINVAL),
    (Command.MIG_DATA_READ, MigData(1, b"x").pack(), EINVAL),
    (Command.MIG_DATA_WRITE, MigData(5).pack(), EINVAL),
]


@pytest.mark.parametrize(("command", "body", "expected"), BAD_REQUESTS)
def test_i9_bad_requests_get_an_errno_and_the_connection_goes_on(
    peer: Any, device: Any, open_fds: Callable[[], int], command: int, body: bytes, expected: int
) -> None:
    peer.ask(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))
    before = open_fds()
    assert peer.ask(command, body) == (expected, b"")
    assert peer.ask(command, body, fds=(0, 0))[0] in (expected, EINVAL)
    assert peer.ask(Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))[0] == 0
    assert device.events == []
    assert open_fds() == before


def test_an_error_of_the_device_reaches_the_client(peer: Any, device: Any) -> None:
    device.refuse = {"read": EACCES, "reset": EIO}
    assert peer.ask(Command.REGION_READ, RegionAccess(0, 0, 1).pack()) == (EACCES, b"")
    assert peer.ask(Command.DEVICE_RESET) == (EIO, b"")


def test_a_mistake_of_the_device_is_an_io_error(peer: Any, device: Any) -> None:
    device.region_read = lambda region, offset, count: b"too long"
    assert peer.ask(Command.REGION_READ, RegionAccess(0, 0, 1).pack()) == (EIO, b"")
    device.migration_read = lambda size: bytes(size + 1)
    assert peer.ask(Command.MIG_DATA_READ, MigData(1).pack()) == (EIO, b"")
    del device.registers
    assert peer.ask(Command.REGION_WRITE, RegionAccess(0, 0, 1, b"x").pack()) == (EIO, b"")


def test_interrupts(peer: Any, device: Any, open_fds: Callable[[], int]) -> None:
    eventfd = os.eventfd(0)
    before = open_fds()
    set_four = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 0, 4)
    assert peer.ask(Command.DEVICE_SET_IRQS, set_four.pack(), fds=(eventfd,) * 4)[0] == 0
    assert open_fds() == before + 4
    none = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 0, 1)
    assert peer.ask(Command.DEVICE_SET_IRQS, none.pack())[0] == 0
    assert peer.ask(Command.DEVICE_SET_IRQS, set_four.pack(), fds=(eventfd,) * 3)[0] == EINVAL
    disable = SetIrqs(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, 2, 0, 0)
    assert peer.ask(Command.DEVICE_SET_IRQS, disable.pack(), fds=(eventfd,))[0] == EINVAL
    assert peer.ask(Command.DEVICE_SET_IRQS, disable.pack())[0] == 0
    assert device.events == [("irqs", set_four, 4), ("irqs", none, 0), ("irqs", disable, 0)]
    os.eventfd_write(device.fds[3], 5)
    assert os.eventfd_read(eventfd) == 5
    device.refuse = {"irqs": EIO}
    assert peer.ask(Command.DEVICE_SET_IRQS, set_four.pack(), fds=(eventfd,) * 4)[0] == EIO
    assert open_fds() == before + 4
    peer.close()
    assert device.gone.wait(10)
    os.close(eventfd)


def test_dma_regions(peer: Any, device: Any, open_fds: Callable[[], int]) -> None:
    low, high = DmaMap(3, 0, 0, 4 * PAGE), DmaMap(1, PAGE, 8 * PAGE, PAGE)
    before = open_fds()
    assert peer.ask(Command.DMA_MAP, low.pack()) == (0, b"")
    assert peer.ask(Command.DMA_MAP, high.pack(), fds=(0,)) == (0, b"")
    assert open_fds() == before + 1
    for address, size in [(0, 4), (3, 1), (3, 9), (0, 16), (7, 2), (8, 1)]:
        overlapping = DmaMap(3, 0, address * PAGE, size * PAGE).pack()
        assert peer.ask(Command.DMA_MAP, overlapping, fds=(0,)) == (EEXIST, b"")
    device.refuse = {"map": EIO}
    assert peer.ask(Command.DMA_MAP, DmaMap(3, 0, 4 * PAGE, PAGE).pack(), fds=(0,)) == (EIO, b"")
    device.refuse = {}
    assert peer.ask(Command.DMA_MAP, DmaMap(3, 0, 4 * PAGE, PAGE).pack(), fds=(0, 0))[0] == EINVAL
    assert open_fds() == before + 1
    for address, size in [(0, 3), (0, 5), (1, 3), (8, 2), (4, 1)]:
        body = DmaUnmap(0, address * PAGE, size * PAGE).pack()
        assert peer.ask(Command.DMA_UNMAP, body) == (ENOENT, b"")
    unmap = DmaUnmap(0, 0, 4 * PAGE)
    device.refuse = {"unmap": EIO}
    assert peer.ask(Command.DMA_UNMAP, unmap.pack()) == (EIO, b"")
    device.refuse = {}
    assert peer.ask(Command.DMA_UNMAP, unmap.pack()) == (0, unmap.pack())
    assert peer.ask(Command.DMA_UNMAP, unmap.pack()) == (ENOENT, b"")
    assert peer.ask(Command.DMA_MAP, low.pack()) == (0, b"")
    every = DmaUnmap(2, 0, 0)
    assert peer.ask(Command.DMA_UNMAP, every.pack()) == (0, every.pack())
    assert device.events == [
        ("map", low, False),
        ("map", high, True),
        ("unmap", unmap),
        ("map", low, False),
        ("unmap", unmap),
        ("unmap", DmaUnmap(0, 8 * PAGE, PAGE)),
    ]


def test_no_more_dma_regions_than_agreed(connect_raw: Callable[[], Any]) -> None:
    peer = connect_raw()
    body = Version(capabilities=Capabilities(max_dma_maps=2)).pack()
    assert peer.ask(Command.VERSION, body)[0] == 0
    for page, expected in [(0, 0), (1, 0), (2, ENOSPC)]:
        assert peer.ask(Command.DMA_MAP, DmaMap(3, 0, page * PAGE, PAGE).pack())[0] == expected
    assert peer.ask(Command.DMA_UNMAP, DmaUnmap(0, 0, PAGE).pack())[0] == 0
    assert peer.ask(Command.DMA_MAP, DmaMap(3, 0, 2 * PAGE, PAGE).pack())[0] == 0


def test_features(peer: Any, device: Any) -> None:
    device.feature_data = MigState(MigrationState.RUNNING, 0).pack()
    get = Feature.get(FeatureIndex.MIG_DEVICE_STATE, 8)
    errno, body = peer.ask(Command.DEVICE_FEATURE, get.pack())
    assert (errno, body) == (0, Feature(get.flags, device.feature_data).pack())
    small = Feature(get.flags, b"", 15)
    errno, body = peer.ask(Command.DEVICE_FEATURE, small.pack())
    assert (errno, body) == (0, struct.pack("<II", 16, get.flags))
    device.feature_data = b""
    probe = Feature.probe(FeatureIndex.DMA_LOGGING_START)
    set_stop = Feature.set(FeatureIndex.MIG_DEVICE_STATE, MigState(MigrationState.STOP).pack())
    for request in (probe, set_stop):
        assert peer.ask(Command.DEVICE_FEATURE, request.pack()) == (0, request.pack())
    device.feature_data = LoggingControl(65536).pack()
    start = Feature.set(FeatureIndex.DMA_LOGGING_START, LoggingControl(4096).pack())
    errno, body = peer.ask(Command.DEVICE_FEATURE, start.pack())
    assert (errno, Feature.unpack(body).data) == (0, device.feature_data)
    assert [event[1] for event in device.events] == [get, small, probe, set_stop, start]


def test_i9_a_dirty_bitmap_beyond_a_transfer_is_not_asked_of_the_device(
    peer: Any, device: Any
) -> None:
    huge = LoggingReport(0, 1 << 60, 1).pack()
    request = Feature.get(FeatureIndex.DMA_LOGGING_REPORT, 1 << 20, huge)
    assert peer.ask(Command.DEVICE_FEATURE, request.pack()) == (EINVAL, b"")
    garbage = Feature.get(FeatureIndex.DMA_LOGGING_REPORT, 1 << 20, b"abc")
    assert peer.ask(Command.DEVICE_FEATURE, garbage.pack()) == (EINVAL, b"")
    assert device.events == []


def test_a_reply_that_no_message_can_hold_is_an_error(peer: Any, device: Any) -> None:
    device.feature_data = bytes(1 << 21)
    request = Feature.get(FeatureIndex.MIGRATION, 1 << 22)
    assert peer.ask(Command.DEVICE_FEATURE, request.pack()) == (EINVAL, b"")


def test_migration_data(peer: Any, device: Any) -> None:
    device.stream = b"0123456789"
    read = MigData(8).pack()
    assert peer.ask(Command.MIG_DATA_READ, read) == (0, MigData(8, b"01234567").pack())
    assert peer.ask(Command.MIG_DATA_READ, read) == (0, MigData(2, b"89").pack())
    assert peer.ask(Command.MIG_DATA_READ, read) == (0, MigData(0).pack())
    assert peer.ask(Command.MIG_DATA_READ, MigData(0).pack()) == (0, MigData(0).pack())
    assert peer.ask(Command.MIG_DATA_WRITE, MigData(3, b"abc").pack()) == (0, b"")
    assert device.received == b"abc"


def test_what_a_device_does_not_have_is_not_supported(
    device: Any, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defaults of `Device`, through the client."""
    from lab.vfio_user.server import Device

    for name in ("set_irqs", "reset", "feature", "migration_read", "migration_write"):
        monkeypatch.setattr(type(device), name, getattr(Device, name))
    for name in ("dma_map", "dma_unmap", "region_fd"):
        monkeypatch.setattr(type(device), name, getattr(Device, name))
    with Client(served) as client:
        for refused in (
            lambda: client.set_irqs(SetIrqs(0x21, 2, 0, 0)),
            client.reset,
            lambda: client.feature(Feature.probe(1)),
            lambda: client.mig_read(1),
            lambda: client.mig_write(b"x"),
        ):
            with pytest.raises(VfioUserError) as refusal:
                refused()
            assert refusal.value.errno == ENOTSUP
        client.dma_map(DmaMap(3, 0, 0, PAGE), 0)
        client.dma_unmap(DmaUnmap(0, 0, PAGE))
        assert client.region_mapping(2)[1] is None
