"""Each system call of the gateway's loop fails once, at each step of a session, with each errno
that the system may give for want of something: the VMM's connection lives, its accesses are
answered rightly, and what is lost is one attempt to connect, one access of the device, or one
controller."""

import errno
import fcntl
import mmap
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.vfio_user.client import Client
from sync.gateway.control.blocking import BlockingClient
from sync.gateway.control.requests import CollectDirty, Mediate, Passthrough, TakeJournal
from sync.gateway.engine.core import Limits
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.loop import Gateway
from sync.gateway.errors import GatewayError
from sync.vfio_user.protocol import Disconnected, DmaMap, IrqSet, SetIrqs, VfioUserError
from tests.sync.gateway.conftest import House, ServedDevice
from tests.sync.gateway.raw_peers import PAGE, new_ram

DEADLINE_S = 20.0
MOST = 8
"""Positions that are tried of the calls of one kind, evenly."""
CUT = -1
"""Not an errno: the descriptors of a message do not arrive."""

KINDS: dict[str, list[int]] = {
    "socket": [errno.EMFILE, errno.ENOBUFS],
    "connect": [errno.EAGAIN, errno.ECONNREFUSED],
    "accept": [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED],
    "recvmsg_into": [errno.ENOMEM, errno.ENOBUFS, CUT],
    "recvmsg": [errno.ENOMEM, errno.ECONNRESET],
    "send": [errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN],
    "sendmsg": [errno.ETOOMANYREFS, errno.ENOBUFS, errno.EAGAIN],
    "register": [errno.ENOSPC, errno.ENOMEM],
    "modify": [errno.ENOMEM],
    "unregister": [errno.ENOENT],
    "poll": [errno.EINTR, errno.ENOMEM],
    "mmap": [errno.ENOMEM, errno.EAGAIN],
    "dup": [errno.EMFILE],
    "fstat": [errno.ENOMEM, errno.EOVERFLOW],
    "memfd_create": [errno.EMFILE, errno.ENOMEM],
    "ftruncate": [errno.ENOSPC],
    "pwrite": [errno.ENOSPC, errno.EFAULT],
    "pread": [errno.EIO],
    "preadv": [errno.EFAULT],
    "fcntl": [errno.EINVAL],
}


class Faults:
    """Has the `position`-th call of `kind` in the gateway's thread fail with `number`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.thread: int | None = None
        self.counts: Counter[str] = Counter()
        self.planned: tuple[str, int, int] | None = None
        for name in ("accept", "connect", "recvmsg_into", "recvmsg", "send", "sendmsg"):
            call = self._failing(name, getattr(socket.socket, name))
            monkeypatch.setattr(socket.socket, name, call)
        init = socket.socket.__init__
        failing_init = self._failing("socket", init)

        def init_socket(sock: socket.socket, *arguments: Any, **options: Any) -> None:
            # With a descriptor that is there already, nothing is asked of the system.
            (init if "fileno" in options else failing_init)(sock, *arguments, **options)

        monkeypatch.setattr(socket.socket, "__init__", init_socket)
        for name in ("dup", "fstat", "memfd_create", "ftruncate", "pwrite", "pread", "preadv"):
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))
        monkeypatch.setattr(mmap, "mmap", self._failing("mmap", mmap.mmap))
        monkeypatch.setattr(fcntl, "fcntl", self._failing("fcntl", fcntl.fcntl))
        epoll, failing = select.epoll, self._failing

        class Epoll:
            def __init__(self) -> None:
                self._ours = ours = epoll()
                for name in ("register", "modify", "unregister", "poll"):
                    setattr(self, name, failing(name, getattr(ours, name)))
                self.close, self.fileno = ours.close, ours.fileno

            @property
            def closed(self) -> bool:
                return self._ours.closed

        monkeypatch.setattr(select, "epoll", Epoll)
        run = Gateway.run

        def run_here(gateway: Gateway) -> None:
            self.thread = threading.get_ident()
            run(gateway)

        monkeypatch.setattr(Gateway, "run", run_here)

    def plan(self, kind: str, position: int, number: int) -> None:
        self.counts.clear()
        self.planned = (kind, position, number)

    def _failing(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != self.thread:
                return call(*arguments, **options)
            position = self.counts[kind]
            self.counts[kind] += 1
            number = None
            if self.planned is not None and self.planned[:2] == (kind, position):
                number = self.planned[2]
            if number is None:
                return call(*arguments, **options)
            if number != CUT:
                raise OSError(number, os.strerror(number))
            received, ancillary, flags, address = call(*arguments, **options)
            if not ancillary:
                return received, ancillary, flags, address
            for _, _, data in ancillary:
                for at in range(0, len(data), 4):
                    os.close(int.from_bytes(data[at : at + 4], "little"))
            return received, [], flags | socket.MSG_CTRUNC, address

        return failing


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def _again(what: Callable[[], Any], *errors: type[Exception]) -> Any:
    """The fault may cost one attempt: the others have to work."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return what()
        except errors:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def _session(house: House, device: ServedDevice) -> None:
    """A VMM that starts, a device that writes by message, a migration that is given up."""
    house.serve(device)
    vmm: Client = _again(house.vmm, OSError, Disconnected)
    ram = new_ram(4)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        _again(lambda: vmm.dma_map(DmaMap(3, 0, 0x10000, 4 * PAGE), ram), VfioUserError)
        assign = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 0, 1)
        _again(lambda: vmm.set_irqs(assign, [event]), VfioUserError)
        _access(vmm, b"one.")
        _again(lambda: _migrate(house, vmm, device, ram), OSError, GatewayError)
        _access(vmm, b"last")
        _again(lambda: BlockingClient(str(house.control_path), 5.0), OSError, GatewayError)
        assert os.eventfd_read(event) >= 1, "the vectors are the VMM's"
    finally:
        os.close(ram)
        os.close(event)


def _access(vmm: Client, data: bytes) -> None:
    vmm.region_write(0, 0, data)
    assert vmm.region_read(0, 0, 4) == data
    vmm.region_write(0, 8, data[::-1], posted=True)
    assert vmm.region_read(0, 8, 4) == data[::-1]


def _migrate(house: House, vmm: Client, device: ServedDevice, ram: int) -> None:
    with BlockingClient(str(house.control_path), 5.0, ClientRole.SOURCE) as gateway:
        gateway.call(Mediate("message", PAGE, True))
        _access(vmm, b"two.")
        assert device.dma is not None
        dma = device.dma
        _again(lambda: dma.write(0x11000, b"written by the device"), VfioUserError)
        assert os.pread(ram, 21, PAGE) == b"written by the device"
        assert _again(lambda: dma.read(0x11000, 7), VfioUserError) == b"written"
        gateway.call(CollectDirty())
        assert len(gateway.call(TakeJournal(100)).records) >= 4 * 32
        gateway.call(Passthrough())
        house.gateway.core.link.interrupts.fire_all()


@pytest.mark.parametrize("kind", KINDS)
def test_i9_any_call_may_fail_with_any_errno(faults: Faults, tmp_path: Path, kind: str) -> None:
    def run() -> None:
        house = House(tmp_path, Limits())
        try:
            _session(house, ServedDevice())
        finally:
            faults.thread = None
            house.close()
            house.device_path.unlink(missing_ok=True)

    run()
    count = faults.counts[kind]
    assert count, f"the session makes no {kind!r}"
    for position in range(0, count, -(-count // MOST)):
        for number in KINDS[kind]:
            faults.plan(kind, position, number)
            run()
