"""What the gateway tests share.

`Bench`: a link between a VMM and a model device without sockets or threads, so that every
interleaving can be chosen. `House`: a real gateway in a thread, with a device behind it and VMMs
and controllers before it, all over sockets.
"""

import errno
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.vfio_user.client import Client
from lab.vfio_user.server import Device, DmaPort, Server
from sync.errors import SyncError
from sync.gateway.engine.core import Limits
from sync.gateway.engine.custody import Custody
from sync.gateway.engine.device_handshake import handshake
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.job_runner import Job
from sync.gateway.engine.loop import Gateway, GatewayOptions
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    HEADER,
    Capabilities,
    Command,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Feature,
    IrqInfo,
    MigrationState,
    RegionInfo,
    SetIrqs,
    Version,
    VfioUserError,
    encode_message,
)
from tests.sync.gateway.model_device import DeviceFeatures, ModelDevice, Registers

WAIT_S = 10.0

Bytes = bytes | bytearray | memoryview


class Bench:
    """A link with a model device, stepped by hand. `now` is its clock, in seconds."""

    def __init__(self, device: ModelDevice, *, journal_records: int = 1 << 16) -> None:
        self.device = device
        self.now = 0.0
        self.custody = Custody()
        self.to_device: deque[tuple[bytes, int]] = deque()
        self.to_vmm: list[tuple[bytes, int]] = []
        self.dma_replies: list[bytes] = []
        self.link = DeviceLink(
            self._to_device,
            lambda: self.now,
            deadline_s=5.0,
            journal_records=journal_records,
            generation=1,
        )
        self._next_id = 0
        assert self.job(handshake(self.link.facts)) is None
        self.link.attach_vmm(self._to_vmm, Version(capabilities=Capabilities(max_msg_fds=16)))
        self.custody.vmm_came()
        device.commands.clear()
        device.registers.log.clear()

    def close(self) -> None:
        self.link.close()

    def _to_device(self, message: Bytes, descriptors: Sequence[int]) -> None:
        self.to_device.append((bytes(message), len(descriptors)))
        for descriptor in descriptors:
            os.close(descriptor)

    def _to_vmm(self, message: Bytes, descriptors: Sequence[int]) -> None:
        self.to_vmm.append((bytes(message), len(descriptors)))
        for descriptor in descriptors:
            os.close(descriptor)

    def step(self) -> bool:
        """The device executes its next message and its reply arrives; False if it has none."""
        if not self.to_device:
            return False
        reply = self.device.execute(*self.to_device.popleft())
        if reply:
            self.answer(reply)
        return True

    def answer(self, reply: bytes) -> None:
        """A message of the device arrives."""
        message_id, command, _, flags, error = HEADER.unpack_from(reply)
        number = error if flags & 0x20 else 0
        relay = self.link.relay
        relay.from_device(message_id, command, flags, number, memoryview(bytearray(reply)), [])

    def settle(self) -> None:
        while self.step():
            pass

    def vmm(
        self, command: int, body: bytes = b"", *, posted: bool = False, fds: tuple[int, ...] = ()
    ) -> int:
        """The VMM sends a command (with duplicates of `fds`); returns its id."""
        self._next_id = (self._next_id + 1) & 0xFFFF
        message = encode_message(self._next_id, command, body, no_reply=posted)
        flags = FLAG_NO_REPLY if posted else 0
        copies = [os.dup(fd) for fd in fds]
        relay = self.link.relay
        view = memoryview(bytearray(message))
        relay.from_vmm(self._next_id, command, flags, 0, view, copies)
        return self._next_id

    def ask(self, command: int, body: bytes = b"", **options: Any) -> tuple[int, bytes]:
        """The VMM sends a command and gets its reply: errno and body."""
        number = self.vmm(command, body, **options)
        self.settle()
        return self.reply_to(number)

    def reply_to(self, number: int) -> tuple[int, bytes]:
        for message, _ in self.to_vmm:
            message_id, _, _, flags, error = HEADER.unpack_from(message)
            if message_id == number and flags & 1:
                return (error if flags & 0x20 else 0), message[HEADER.size :]
        raise AssertionError("no reply")

    def start(self, job: Job[Any], *, held: bool = False) -> list[tuple[Any, SyncError | None]]:
        """Starts a job; the list gets (result, error) when it ends."""
        outcome: list[tuple[Any, SyncError | None]] = []
        self.link.runner.start(
            job, lambda result, error: outcome.append((result, error)), held=held
        )
        return outcome

    def job(self, job: Job[Any], *, held: bool = False) -> Any:
        """Runs a job to its end; returns its result or raises its error."""
        outcome = self.start(job, held=held)
        self.settle()
        ((result, error),) = outcome
        if error is not None:
            raise error
        return result

    def share(self, address: int, size: int, *, flags: int = 3, fd: bool = True) -> int:
        """The VMM shares memory; returns its descriptor, or -1."""
        number = os.memfd_create("ram") if fd else -1
        if fd:
            os.ftruncate(number, size)
        body = DmaMap(flags, 0, address, size).pack()
        error, _ = self.ask(Command.DMA_MAP, body, fds=(number,) if fd else ())
        assert error == 0
        return number

    def dma(self, command: int, body: bytes, *, message_id: int = 9) -> tuple[int, bytes]:
        """The device sends a DMA message on its own socket: errno and body of the reply."""
        message = encode_message(message_id, command, body)
        replies: list[bytes] = []
        self.link.relay.from_twin(
            message_id,
            command,
            0,
            memoryview(bytearray(message)),
            lambda data, fds: replies.append(bytes(data)),
        )
        (reply,) = replies
        _, _, _, flags, error = HEADER.unpack_from(reply)
        return (error if flags & 0x20 else 0), reply[HEADER.size :]


class ServedDevice(Device):
    """The same device behind A's server, in a thread of its own."""

    def __init__(self, *, v2: bool = False, logging: bool = False, resettable: bool = True) -> None:
        self.registers = Registers()
        self.features = DeviceFeatures(v2=v2, logging=logging)
        self.resettable = resettable
        self.mapped: dict[int, tuple[DmaMap, bool]] = {}
        self.events: list[str] = []
        self.dma: DmaPort | None = None
        self.attachments = 0
        self.changed = threading.Condition()
        self.on_read: Callable[[int], None] | None = None
        self.on_unmap: Callable[[], None] | None = None
        self.vectors: list[int] = []

    def wait(self, predicate: Callable[[], bool]) -> None:
        """Waits until something about the device makes `predicate` true."""
        with self.changed:
            assert self.changed.wait_for(predicate, WAIT_S)

    def _note(self, event: str) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(3 if self.resettable else 2, 9, 5)

    def region_info(self, index: int) -> RegionInfo:
        return RegionInfo(index, 3, {0: 4096, 7: 256}.get(index, 0))

    def irq_info(self, index: int) -> IrqInfo:
        return IrqInfo(index, 1, 4 if index == 2 else 0)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        if self.on_read is not None:
            self.on_read(offset)
        return self.registers.read(region, offset, count)

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        self.registers.write(region, offset, data)

    def set_irqs(self, request: SetIrqs, fds: list[int]) -> None:
        self.vectors += fds

    def dma_map(self, region: DmaMap, fd: int | None) -> None:
        self.mapped[region.address] = (region, fd is not None)
        if fd is not None:
            os.close(fd)
        self._note("map")

    def dma_unmap(self, request: DmaUnmap) -> None:
        if self.on_unmap is not None:
            self.on_unmap()
        del self.mapped[request.address]
        self._note("unmap")

    def reset(self) -> None:
        if not self.resettable:
            raise VfioUserError(errno.ENOTSUP)
        self.registers.reset()
        self.features.state = MigrationState.RUNNING
        self._note("reset")

    def feature(self, request: Feature) -> bytes:
        return self.features.handle(request)

    def migration_read(self, size: int) -> bytes:
        state = self.features
        part, state.state_data = state.state_data[:size], state.state_data[size:]
        return part

    def migration_write(self, data: bytes) -> None:
        self.features.loaded += data

    def attached(self, dma: DmaPort) -> None:
        self.dma = dma
        self.attachments += 1
        self._note("attached")

    def detached(self) -> None:
        self.mapped.clear()
        while self.vectors:
            os.close(self.vectors.pop())
        self._note("detached")


class Pause:
    """Makes the device wait in a register read until it is released."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()

    def __call__(self, offset: int) -> None:
        self.reached.set()
        assert self._released.wait(WAIT_S)

    def release(self) -> None:
        self._released.set()


class House:
    """A gateway in a thread; its device is served while `serve` was called."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.vmm_path = folder / "vmm.sock"
        self.device_path = folder / "device.sock"
        self.control_path = folder / "control.sock"
        self.events: list[tuple[str, dict[str, object]]] = []
        self._changed = threading.Condition()
        self._servers: list[tuple[Server, threading.Thread]] = []
        self._clients: list[Client] = []
        self.gateway: Gateway
        self._thread: threading.Thread
        self._limits = limits
        self.open()

    def open(self) -> None:
        """Starts a gateway (again)."""
        options = GatewayOptions(
            self.vmm_path, self.device_path, self.control_path, limits=self._limits
        )
        self.gateway = Gateway(options, self._log)
        self._thread = threading.Thread(target=self.gateway.run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self.gateway.stop()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _log(self, event: str, **fields: object) -> None:
        with self._changed:
            self.events.append((event, fields))
            self._changed.notify_all()

    def seen(self, event: str) -> list[dict[str, object]]:
        return [fields for name, fields in self.events if name == event]

    def wait_event(self, event: str, count: int = 1) -> dict[str, object]:
        """Waits until `event` was logged `count` times; returns the fields of the last one."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.seen(event)) >= count, WAIT_S), (
                f"no {event!r} in {self.events}"
            )
        return self.seen(event)[-1]

    def second(self) -> None:
        """Tries to start another gateway at the same sockets."""
        options = GatewayOptions(self.vmm_path, self.device_path, self.control_path)
        Gateway(options, self._log).close()

    def serve(self, device: Device, **options: Any) -> Server:
        server = Server(self.device_path, device, **options)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self._servers.append((server, thread))
        return server

    def end_device(self, server: Server) -> None:
        """Ends a device; its socket file is gone then, so that another can be served."""
        server.close()
        for each, thread in self._servers:
            if each is server:
                thread.join(WAIT_S)
                assert not thread.is_alive()

    def vmm(self, **options: Any) -> Client:
        """A VMM that has connected."""
        client = Client(self.vmm_path, timeout_s=WAIT_S, **options)
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.end()
        for server, thread in self._servers:
            server.close()
            thread.join(WAIT_S)


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    """A function that makes a bench: v2=, logging=, journal_records=."""
    benches: list[Bench] = []

    def make(*, journal_records: int = 1 << 16, **features: bool) -> Bench:
        benches.append(Bench(ModelDevice(**features), journal_records=journal_records))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


@pytest.fixture
def make_house(tmp_path: Path) -> Iterator[Callable[..., House]]:
    """A function that makes a house; its arguments are the gateway's limits."""
    houses: list[House] = []

    def make(**limits: Any) -> House:
        limits.setdefault("device_deadline_s", WAIT_S)
        houses.append(House(tmp_path, Limits(**limits)))
        return houses[-1]

    yield make
    for house in houses:
        house.close()


@pytest.fixture
def pause() -> Pause:
    return Pause()


@pytest.fixture
def make_device() -> type[ServedDevice]:
    return ServedDevice


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Waits for a condition that nobody announces."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        pause = threading.Event()
        while not condition():
            assert time.monotonic() < deadline
            pause.wait(0.005)

    return wait


@pytest.fixture
def rng() -> random.Random:
    return random.Random(1)
