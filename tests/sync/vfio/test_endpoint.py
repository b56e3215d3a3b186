"""A function of the host as the gateway's loop sees it: messages in, replies out. The function is a
model NVMe controller behind a double of the kernel."""

import errno
import os
import random
import struct
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import Generic, TypeVar

import pytest

from sync.queues.errors import MemoryUnreadable
from sync.vfio.device import VfioDevice
from sync.vfio.endpoint import HostEndpoint
from sync.vfio.sysfs import PciFunction
from sync.vfio_user.protocol import (
    HEADER_BYTES,
    Capabilities,
    Command,
    DeviceInfo,
    DeviceInfoRequest,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureFlags,
    IrqInfo,
    IrqInfoRequest,
    IrqSet,
    MigData,
    MigrationFlags,
    MigrationState,
    MigState,
    RegionAccess,
    RegionInfo,
    RegionInfoRequest,
    SetIrqs,
    Version,
    encode_message,
)
from tests.sync.queues.world import GUEST_IOVA, Driver, DriverCq, DriverSq
from tests.sync.vfio.fake_kernel import FakeKernel, FakeSysfs
from tests.sync.vfio.model_kernel import ModelKernel

ADDRESS = "0000:01:00.0"
RAM_BYTES = 2 << 20
INTX, MSIX, ERR, REQ, CONFIG = 0, 2, 3, 4, 7


class Ram:
    """Guest memory in a file, as a VMM shares it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, RAM_BYTES)
        self.bytes = mmap(self.fd, RAM_BYTES)
        self.bytes[:] = b"\xa5" * RAM_BYTES
        self._free = GUEST_IOVA

    def allocate(self, length: int) -> int:
        iova, self._free = self._free, self._free + (-(-length // 4096) << 12)
        self.write(iova, bytes(length))
        return iova

    def untouched(self) -> bool:
        """Whether all that nobody has allocated is as it was made."""
        rest = self.bytes[self._free - GUEST_IOVA :]
        return rest == b"\xa5" * len(rest)

    def read(self, iova: int, length: int) -> bytes:
        if not 0 <= iova - GUEST_IOVA <= RAM_BYTES - length:
            raise MemoryUnreadable(f"{iova:#x}")
        return self.bytes[iova - GUEST_IOVA : iova - GUEST_IOVA + length]

    def write(self, iova: int, data: bytes) -> None:
        self.bytes[iova - GUEST_IOVA : iova - GUEST_IOVA + len(data)] = data


class Refused(Exception):
    pass


K = TypeVar("K", bound=FakeKernel)


class Client(Generic[K]):
    """Sends commands, and takes the one reply to each."""

    def __init__(self, kernel: K, folder: Path, *, iommufd: bool = False) -> None:
        self.folder = folder
        folder.mkdir()
        place = FakeSysfs(folder).add(ADDRESS, driver="vfio-pci", group="7")
        (place / "vfio-dev/vfio3").mkdir(parents=True)
        self.kernel = kernel
        self.events: list[tuple[str, str]] = []
        device = VfioDevice(PciFunction(ADDRESS, folder), kernel, iommufd=iommufd)
        self.endpoint = HostEndpoint(device, self._log)
        self.endpoint.handler = self._answered
        self.answers: list[tuple[int, bytes]] = []
        self.ask(Command.VERSION, Version(capabilities=Capabilities()).pack())

    def _log(self, event: str, **fields: object) -> None:
        self.events.append((event, str(fields["reason"])))

    def _answered(
        self,
        message_id: int,
        command: int,
        flags: int,
        error: int,
        message: memoryview,
        fds: object,
    ) -> None:
        assert flags & 1
        self.answers.append((error, bytes(message[HEADER_BYTES:])))

    def ask(self, command: int, body: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        self.begin(command, body, fds)
        while not self.answers:
            self.endpoint.receive()
            self.endpoint.flush()
        ((error, answer),) = self.answers
        self.answers.clear()
        if error:
            raise Refused(errno.errorcode[error])
        return answer

    def begin(self, command: int, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Send a command, and take its answer if there is one at once."""
        self.endpoint.send(encode_message(1, command, body), [os.dup(fd) for fd in fds])
        self.endpoint.flush()

    def write(self, offset: int, data: bytes, region: int = 0) -> None:
        access = RegionAccess(offset, region, len(data), data)
        self.ask(Command.REGION_WRITE, access.pack())

    def read(self, offset: int, count: int, region: int = 0) -> bytes:
        access = RegionAccess(offset, region, count)
        return RegionAccess.unpack(self.ask(Command.REGION_READ, access.pack())).data

    def share(self, ram: Ram) -> None:
        self.ask(Command.DMA_MAP, DmaMap(3, 0, GUEST_IOVA, RAM_BYTES).pack(), (ram.fd,))

    def take_away(self) -> None:
        self.ask(Command.DMA_UNMAP, DmaUnmap(0, GUEST_IOVA, RAM_BYTES).pack())

    def enter(self, state: MigrationState) -> None:
        self.ask(Command.DEVICE_FEATURE, Feature.set(2, MigState(state).pack()).pack())

    def state(self) -> MigrationState:
        answer = self.ask(Command.DEVICE_FEATURE, Feature.get(2, 8).pack())
        return MigState.unpack(Feature.unpack(answer).data).device_state

    def stream(self) -> bytes:
        data = b""
        while part := MigData.unpack(self.ask(Command.MIG_DATA_READ, MigData(100).pack())).data:
            data += part
        return data

    def give(self, data: bytes) -> None:
        for at in range(0, len(data), 77):
            part = data[at : at + 77]
            self.ask(Command.MIG_DATA_WRITE, MigData(len(part), part).pack())

    def dirty(self) -> set[int]:
        first = GUEST_IOVA // 4096
        return {page - first for page in self.endpoint.take_written()}


Model = Client[ModelKernel]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Model]:
    client = Client(ModelKernel({}), tmp_path / "a")
    yield client
    client.endpoint.close()
    assert not client.kernel.opened


@pytest.fixture
def target(tmp_path: Path, source: Model) -> Iterator[Model]:
    client = Client(ModelKernel(source.kernel.controller.blocks, 2), tmp_path / "b")
    yield client
    if client.kernel.opened:
        client.endpoint.close()


class Guest:
    """A guest whose driver has one pair of I/O queues."""

    def __init__(self, here: Model) -> None:
        self.ram = Ram()
        self.here = here
        self.random = random.Random(1)
        here.share(self.ram)
        here.write(4, b"\x06\x01", CONFIG)
        here.write(0x3C, b"\x0b", CONFIG)
        self.lines = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self.use_interrupts(here, flags)
        self.driver = Driver(self.ram, self._access)  # type: ignore[arg-type]
        self.driver.enable(8, 8)
        cq = DriverCq(1, self.ram.allocate(64 * 16), 16)
        sq = DriverSq(1, self.ram.allocate(64 * 64), 16, cq)
        self.admin(0x05, prp1=cq.base, dwords=(15 << 16 | 1, 1 << 16 | 3))
        self.admin(0x01, prp1=sq.base, dwords=(15 << 16 | 1, 1 << 16 | 1))
        self.driver.cqs[1], self.driver.sqs[1] = cq, sq
        self.driver.submit(self.driver.sqs[0], 0x0C)

    def use_interrupts(self, client: Model, flags: int) -> None:
        body = SetIrqs(flags, MSIX, 0, len(self.lines)).pack()
        client.ask(Command.DEVICE_SET_IRQS, body, tuple(self.lines))

    def _access(self, offset: int, data: bytes) -> None:
        self.here.write(offset, data)

    def admin(self, opcode: int, **fields: object) -> None:
        self.driver.submit(self.driver.sqs[0], opcode, **fields)  # type: ignore[arg-type]
        assert self.driver.take(self.driver.cqs[0]) == 1

    def work(self, count: int) -> None:
        for _ in range(count):
            self.driver.read_or_write(self.driver.sqs[1], self.random)
            assert self.driver.take(self.driver.cqs[1]) == 1


def test_a_function_tells_what_it_is(source: Model) -> None:
    info = DeviceInfo.unpack(source.ask(Command.DEVICE_GET_INFO, DeviceInfoRequest().pack()))
    assert info.flags == 3
    answer = source.ask(Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(0).pack())
    region = RegionInfo.unpack(answer)
    assert (region.size, region.flags) == (0x4000, 3)
    answer = source.ask(Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(3).pack())
    assert RegionInfo.unpack(answer).size == 0
    answer = source.ask(Command.DEVICE_GET_IRQ_INFO, IrqInfoRequest(MSIX).pack())
    assert IrqInfo.unpack(answer).count == 65
    answer = source.ask(Command.DEVICE_FEATURE, Feature.get(1, 8).pack())
    assert MigrationFlags.unpack(Feature.unpack(answer).data).flags == 5
    with pytest.raises(Refused, match="ENOTSUP"):
        source.ask(Command.DEVICE_FEATURE, Feature.probe(8, FeatureFlags.GET).pack())


def test_a_guest_moves_with_its_queues_from_function_to_function(
    source: Model, target: Model
) -> None:
    guest = Guest(source)
    guest.work(21)
    source.enter(MigrationState.PRE_COPY)
    target.enter(MigrationState.RESUMING)
    target.give(source.stream())
    guest.work(5)
    source.enter(MigrationState.STOP_COPY)
    before = guest.ram.bytes[:]
    target.give(source.stream())
    target.enter(MigrationState.STOP)
    assert guest.ram.bytes[:] == before
    assert not target.kernel.mapped
    source.take_away()
    target.share(guest.ram)
    guest.use_interrupts(target, IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER)
    target.enter(MigrationState.RUNNING)
    assert target.state() is MigrationState.RUNNING
    assert target.read(4, 2, CONFIG) == b"\x06\x01"
    assert target.read(0x3C, 1, CONFIG) == b"\x0b"
    guest.here = target
    guest.work(40)
    assert len(target.kernel.controller.events) == 1
    assert not target.kernel.controller.bad_status
    assert not source.events and not target.events
    # And back.
    source.ask(Command.DEVICE_RESET)
    target.enter(MigrationState.STOP_COPY)
    source.enter(MigrationState.RESUMING)
    source.give(target.stream())
    source.enter(MigrationState.STOP)
    target.take_away()
    source.share(guest.ram)
    source.enter(MigrationState.RUNNING)
    guest.here = source
    guest.work(40)


def test_a_target_that_holds_something_else_refuses_and_says_what(
    source: Model, target: Model
) -> None:
    target.kernel.controller.n_blocks = 8192
    target.endpoint.close()
    other = Client(target.kernel, source.folder / "other")
    Guest(source)
    source.enter(MigrationState.STOP_COPY)
    other.enter(MigrationState.RESUMING)
    with pytest.raises(Refused, match="EBUSY"):
        other.give(source.stream())
    assert "namespace 1 blocks: 4096 on the source, 8192 on the target" in other.events[0][1]
    other.endpoint.close()


def test_i9_a_vector_that_is_full_holds_nobody_up(source: Model, target: Model) -> None:
    guest = Guest(source)
    guest.driver.read_or_write(guest.driver.sqs[1], guest.random)
    source.enter(MigrationState.STOP_COPY)
    target.enter(MigrationState.RESUMING)
    target.give(source.stream())
    target.enter(MigrationState.STOP)
    source.take_away()
    target.share(guest.ram)
    guest.lines = [os.eventfd(0) for _ in range(2)]
    os.eventfd_write(guest.lines[1], (1 << 64) - 2)
    guest.use_interrupts(target, IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER)
    target.enter(MigrationState.RUNNING)
    guest.here = target
    assert guest.driver.take(guest.driver.cqs[1]) == 1
    guest.work(3)


def test_i8_a_source_that_is_told_to_go_on_does(source: Model, target: Model) -> None:
    guest = Guest(source)
    guest.work(3)
    source.enter(MigrationState.PRE_COPY)
    target.enter(MigrationState.RESUMING)
    target.give(source.stream())
    source.enter(MigrationState.STOP_COPY)
    source.enter(MigrationState.RUNNING)
    guest.work(30)
    target.ask(Command.DEVICE_RESET)
    assert target.state() is MigrationState.RUNNING
    assert not target.kernel.mapped


def test_a_device_that_cannot_move_says_why(source: Model) -> None:
    guest = Guest(source)
    guest.driver.submit(guest.driver.sqs[0], 0x7C)
    for state in (MigrationState.PRE_COPY, MigrationState.STOP_COPY, MigrationState.STOP):
        with pytest.raises(Refused, match="EBUSY"):
            source.enter(state)
    assert source.state() is MigrationState.RUNNING
    assert source.events[0][0] == "device-cannot-move"
    assert "shadow doorbells" in source.events[0][1]


def test_a_device_that_does_not_come_to_rest_is_left_running(
    source: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sync.vfio.queue_migration.REST_DEADLINE_S", 0.01)
    guest = Guest(source)
    source.kernel.works = False
    guest.driver.read_or_write(guest.driver.sqs[1], guest.random)
    with pytest.raises(Refused, match="EBUSY"):
        source.enter(MigrationState.STOP_COPY)
    assert "do not complete" in source.events[0][1]
    source.kernel.works = True
    source.kernel.controller.run()
    assert guest.driver.take(guest.driver.cqs[1]) == 1
    guest.work(20)


def test_a_vmm_is_served_while_a_device_comes_to_rest(source: Model) -> None:
    guest = Guest(source)
    source.kernel.works = False
    guest.driver.read_or_write(guest.driver.sqs[1], guest.random)
    source.begin(Command.DEVICE_FEATURE, stop_copy())
    for _ in range(3):
        source.endpoint.receive()
        assert source.read(8, 4) == b"\0\0\2\0"
        source.write(0x3C, b"\x0c", CONFIG)
        guest.use_interrupts(source, IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER)
    source.begin(Command.DEVICE_FEATURE, Feature.get(2, 8).pack())
    assert not source.answers
    source.kernel.controller.run()
    while len(source.answers) < 2:
        source.endpoint.receive()
        source.endpoint.flush()
    stopped = [MigState.unpack(Feature.unpack(body).data) for _, body in source.answers]
    assert {each.device_state for each in stopped} == {MigrationState.STOP_COPY}
    source.answers.clear()


def test_a_vmm_is_served_while_a_device_is_walked_and_a_reset_ends_it(
    source: Model, target: Model
) -> None:
    guest = Guest(source)
    guest.work(3)
    source.enter(MigrationState.STOP_COPY)
    target.enter(MigrationState.RESUMING)
    target.kernel.works = False
    stream = source.stream()
    target.begin(Command.MIG_DATA_WRITE, MigData(len(stream), stream).pack())
    for _ in range(3):
        target.endpoint.receive()
        assert target.read(8, 4) == b"\0\0\2\0"
    assert target.kernel.mapped
    target.endpoint.send(encode_message(1, Command.DEVICE_RESET))
    target.endpoint.flush()
    assert [error for error, _ in target.answers] == [errno.ECANCELED, 0]
    target.answers.clear()
    assert not target.kernel.mapped
    assert target.state() is MigrationState.RUNNING


def stop_copy() -> bytes:
    return Feature.set(2, MigState(MigrationState.STOP_COPY).pack()).pack()


def test_an_error_of_the_function_ends_a_migration_and_a_reset_allows_the_next(
    source: Model,
) -> None:
    guest = Guest(source)
    line = os.eventfd(0, os.EFD_NONBLOCK)
    flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
    source.ask(Command.DEVICE_SET_IRQS, SetIrqs(flags, REQ, 0, 1).pack(), (line,))
    source.enter(MigrationState.PRE_COPY)
    for kind, words in ((ERR, "reported an error"), (REQ, "wants it back")):
        source.kernel.fire(kind)
        source.endpoint.receive()
        assert source.events[-1][0] == "device-trouble"
        for command, body in (
            (Command.MIG_DATA_READ, MigData(100).pack()),
            (Command.DEVICE_FEATURE, stop_copy()),
        ):
            with pytest.raises(Refused, match="EBUSY"):
                source.ask(command, body)
            assert words in source.endpoint.reason
        if kind == ERR:
            # The guest goes on with what it has.
            source.enter(MigrationState.RUNNING)
            guest.work(3)
            source.ask(Command.DEVICE_RESET)
            source.enter(MigrationState.PRE_COPY)
    assert os.eventfd_read(line) == 1
    os.close(line)


def test_i1_pages_are_reported_from_the_queues(source: Model) -> None:
    guest = Guest(source)
    assert source.endpoint.tracks_writes
    source.endpoint.start_tracking()
    source.dirty()
    source.kernel.works = False
    buffer = guest.ram.allocate(4096)
    guest.driver.submit(guest.driver.sqs[1], 2, prp1=buffer, dwords=(1,), nsid=1)
    page = (buffer - GUEST_IOVA) // 4096
    assert page in source.dirty()
    assert page in source.dirty()
    source.kernel.controller.run()
    assert page in source.dirty()
    assert page not in source.dirty()
    source.endpoint.stop_tracking()


def test_i4_a_function_is_not_asked_to_reach_memory_by_message(source: Model) -> None:
    guest = Guest(source)
    source.ask(Command.DMA_MAP, DmaMap(3, 0, 0xF000_0000, 0x1000).pack())
    source.take_away()
    assert not source.kernel.mapped
    with pytest.raises(Refused, match="ENOTSUP"):
        source.ask(Command.DMA_MAP, DmaMap(3, 0, GUEST_IOVA, RAM_BYTES).pack())
    source.share(guest.ram)
    guest.work(3)


def test_memory_that_cannot_be_pinned_is_refused_with_its_reason(
    source: Model,
) -> None:
    source.kernel.map_error = errno.ENOMEM
    with pytest.raises(Refused, match="ENOMEM"):
        source.share(Ram())
    assert source.events[0][0] == "memory-not-pinned"


def test_interrupts_are_passed_to_the_kernel(source: Model) -> None:
    guest = Guest(source)
    trigger = IrqSet.ACTION_TRIGGER
    body = SetIrqs(IrqSet.DATA_BOOL | trigger, MSIX, 0, 2, b"\0\1").pack()
    source.ask(Command.DEVICE_SET_IRQS, body)
    assert source.kernel.irqs[-1] == (33, 2, 1, 1)
    body = SetIrqs(IrqSet.DATA_NONE | IrqSet.ACTION_MASK, INTX, 0, 1).pack()
    source.ask(Command.DEVICE_SET_IRQS, body)
    assert source.kernel.irqs[-1] == (9, 0, 0, 1)
    source.ask(Command.DEVICE_SET_IRQS, SetIrqs(IrqSet.DATA_NONE | trigger, MSIX, 0, 0).pack())
    assert source.kernel.irqs[-1] == (33, 2, 0, 0)
    with pytest.raises(Refused, match="EINVAL"):
        source.ask(Command.DEVICE_SET_IRQS, SetIrqs(IrqSet.DATA_NONE | trigger, 9, 0, 1).pack())
    del guest


@pytest.mark.parametrize("command", [Command.DMA_READ, 99])
def test_i9_commands_that_are_not_a_devices_are_refused(source: Model, command: int) -> None:
    with pytest.raises(Refused, match="ENOTSUP"):
        source.ask(command)


@pytest.mark.parametrize(
    "command",
    [
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_SET_IRQS,
        Command.REGION_READ,
        Command.REGION_WRITE,
        Command.REGION_WRITE_MULTI,
        Command.DEVICE_FEATURE,
        Command.MIG_DATA_READ,
    ],
)
def test_i9_what_is_malformed_is_refused_and_nothing_is_said(source: Model, command: int) -> None:
    for body in (b"", b"\xff" * 7, b"\xff" * 64):
        with pytest.raises(Refused):
            source.ask(command, body)
    assert not source.events


def test_i9_a_stream_that_makes_no_sense_is_refused(source: Model, target: Model) -> None:
    for stream in (
        struct.pack("<I", 0xFFFF_FFFF),
        struct.pack("<I", 3) + b"abc",
        struct.pack("<I", 20) + b"x" * 20,
        struct.pack("<I8xI", 12, 0xFFFF),
    ):
        target.enter(MigrationState.RESUMING)
        with pytest.raises(Refused):
            target.give(stream)
            target.enter(MigrationState.STOP)
        target.ask(Command.DEVICE_RESET)
    target.enter(MigrationState.RESUMING)
    with pytest.raises(Refused):
        target.enter(MigrationState.STOP)
    with pytest.raises(Refused):
        target.enter(MigrationState.RUNNING)
