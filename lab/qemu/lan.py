"""The other end of a guest's network: a hub for NICs, and a peer with a TCP/IP stack of its own.

The stack is the kernel's, in a network namespace that nobody else sees: a helper process makes a
TAP device there (tun(4)) with its address, opens the peer's sockets, hands all of them over and
ends. The namespace lives as long as they do; nothing else on the machine changes. Root may do so,
and others where the machine lets them have user namespaces and /dev/net/tun.

The peer serves, at `PEER_ADDRESS`:

    DOWN_PORT   bytes without end, until the guest closes its direction
    UP_PORT     takes bytes, until the guest closes its direction

and it pings the guest all the time. `guest/net.sh` is the guest's end.
"""

import fcntl
import hashlib
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import trio

from lab.devices.e1000.cable import MAX_FRAME_BYTES
from lab.devices.e1000.hub import Hub
from lab.devices.e1000.offload import ones_sum
from lab.qemu.errors import LanUnavailable

PEER_ADDRESS, GUEST_ADDRESS, NETMASK = "10.53.0.1", "10.53.0.2", "255.255.255.0"
DOWN_PORT, UP_PORT = 7001, 7002
PING_INTERVAL_S = 0.01
HELPER_DEADLINE_S = 30.0

_TUN = "/dev/net/tun"
_INTERFACE = b"tap0"
_N_DESCRIPTORS = 5
_BLOCK_BYTES = 1 << 16
_ECHO_REPLY, _ECHO_REQUEST = 0, 8
_ECHO_IDENTIFIER = 0x4645
# linux/if_tun.h, linux/sockios.h, linux/if.h
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _IFF_UP = 0x8914, 0x8916, 0x891C, 0x1


@dataclass(slots=True)
class Transfer:
    """What one connection has carried so far, as the peer sees it."""

    n_bytes: int = 0
    ended: bool = False
    """Both directions are closed, in good order."""
    _digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, data: bytes | bytearray) -> None:
        self.n_bytes += len(data)
        self._digest.update(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@dataclass(slots=True)
class Ping:
    """How the guest answers."""

    sent: int = 0
    answered: int = 0
    longest_gap_s: float = 0.0
    """The longest time between two answers, as exact as `PING_INTERVAL_S`."""
    _last: float | None = None

    def answer(self, now: float) -> None:
        self.answered += 1
        if self._last is not None:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last)
        self._last = now


class Peer:
    """Runs while `open_lan` is open."""

    def __init__(self, snmp: int) -> None:
        self.down = Transfer()
        """To the guest."""
        self.up = Transfer()
        """From the guest."""
        self.ping = Ping()
        self._snmp = snmp

    def wrong_checksums(self) -> int:
        """TCP segments and ICMP messages that came with a wrong checksum; TCP alone would hide
        them, since the guest sends them again."""
        counters = parse_snmp(os.pread(self._snmp, 1 << 16, 0).decode())
        return counters["Tcp", "InCsumErrors"] + counters["Icmp", "InCsumErrors"]


def parse_snmp(text: str) -> dict[tuple[str, str], int]:
    """/proc/net/snmp: by protocol and counter."""
    lines = [line.split() for line in text.splitlines()]
    return {
        (names[0].rstrip(":"), name): int(value)
        for names, values in zip(lines[::2], lines[1::2], strict=True)
        for name, value in zip(names[1:], values[1:], strict=True)
    }


@asynccontextmanager
async def open_lan(path: Path) -> AsyncIterator[Peer]:
    """A hub that listens at `path` for NICs, with a peer. Raises `LanUnavailable`."""
    with ExitStack() as stack:
        ends = await trio.to_thread.run_sync(open_namespace)
        stack.enter_context(ends)
        hub = Hub(path)
        peer = Peer(ends.snmp)
        cable = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(cable.close)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, hub.serve_forever)
            try:
                await cable.connect(str(path))
                nursery.start_soon(_carry_out, ends.tap, cable)
                nursery.start_soon(_carry_in, cable, ends.tap)
                nursery.start_soon(_serve, ends.down, _send_down, peer.down)
                nursery.start_soon(_serve, ends.up, _take_up, peer.up)
                nursery.start_soon(_ping, ends.icmp, peer.ping)
                yield peer
            finally:
                hub.close()
                nursery.cancel_scope.cancel()


async def _carry_out(tap: int, cable: trio.socket.SocketType) -> None:
    while True:
        await trio.lowlevel.wait_readable(tap)
        await cable.send(os.read(tap, MAX_FRAME_BYTES))


async def _carry_in(cable: trio.socket.SocketType, tap: int) -> None:
    while frame := await cable.recv(MAX_FRAME_BYTES):
        os.write(tap, frame)


async def _serve(
    listener: socket.socket,
    talk: Callable[[trio.SocketStream, Transfer], Awaitable[None]],
    transfer: Transfer,
) -> None:
    """One connection. A guest that resets it ends all with an error."""
    accepted, _ = await trio.socket.from_stdlib_socket(listener).accept()
    async with trio.SocketStream(accepted) as stream:
        await talk(stream, transfer)
    transfer.ended = True


async def _send_down(stream: trio.SocketStream, transfer: Transfer) -> None:
    content = random.Random(1).randbytes(_BLOCK_BYTES)
    async with trio.open_nursery() as nursery:
        closed = trio.Event()

        async def wait_closed() -> None:
            while await stream.receive_some(_BLOCK_BYTES):
                pass
            closed.set()

        nursery.start_soon(wait_closed)
        while not closed.is_set():
            # No two blocks are alike: one that is lost, or comes twice, is noticed.
            block = struct.pack("<Q", transfer.n_bytes) + content[8:]
            transfer.add(block)
            await stream.send_all(block)


async def _take_up(stream: trio.SocketStream, transfer: Transfer) -> None:
    async for data in stream:
        transfer.add(data)


async def _ping(icmp: socket.socket, ping: Ping) -> None:
    stream = trio.socket.from_stdlib_socket(icmp)

    async def ask() -> None:
        while True:
            # A guest that is not there yet has no route.
            with suppress(OSError):
                await stream.sendto(echo_request(ping.sent), (GUEST_ADDRESS, 0))
                ping.sent += 1
            await trio.sleep(PING_INTERVAL_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        while True:
            packet = await stream.recv(2048)
            if is_echo_reply(packet):
                ping.answer(trio.current_time())


def echo_request(number: int) -> bytes:
    """An ICMP message (RFC 792) with the lower 16 bits of `number`."""
    words = struct.pack("!HH", _ECHO_IDENTIFIER, number & 0xFFFF)
    checksum = 0xFFFF - ones_sum(bytes((_ECHO_REQUEST, 0, 0, 0)) + words)
    return struct.pack("!BBH", _ECHO_REQUEST, 0, checksum) + words


def is_echo_reply(packet: bytes) -> bool:
    """Whether an IPv4 packet answers an `echo_request`."""
    start = 4 * (packet[0] & 0xF)
    kind, identifier = packet[start : start + 1], packet[start + 4 : start + 6]
    return kind == bytes([_ECHO_REPLY]) and identifier == struct.pack("!H", _ECHO_IDENTIFIER)


@dataclass(frozen=True, slots=True)
class Ends:
    """What reaches into the namespace; it is gone when all of them are closed."""

    tap: int
    down: socket.socket
    up: socket.socket
    icmp: socket.socket
    snmp: int
    """/proc/net/snmp of the namespace, open for reading."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.down, self.up, self.icmp):
            each.close()
        os.close(self.tap)
        os.close(self.snmp)


def open_namespace() -> Ends:
    """A new network namespace with the peer's address. Raises `LanUnavailable`."""
    ours, theirs = socket.socketpair()
    become = ["--net"] if os.geteuid() == 0 else ["--net", "--user", "--map-root-user"]
    command = ["unshare", *become, sys.executable, "-m", "lab.qemu.lan", str(theirs.fileno())]
    with ours, theirs:
        try:
            done = subprocess.run(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=HELPER_DEADLINE_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LanUnavailable(f"cannot make a network namespace: {error}") from error
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise LanUnavailable(f"cannot make a network namespace with a TAP device: {said[0]}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, _N_DESCRIPTORS)
    tap, *numbers, snmp = descriptors
    down, up, icmp = (socket.socket(fileno=number) for number in numbers)
    return Ends(tap, down, up, icmp, snmp)


def _hand_out(channel: int) -> None:
    """The helper, inside the namespace."""
    tap = os.open(_TUN, os.O_RDWR)
    fcntl.ioctl(tap, _TUNSETIFF, _request(struct.pack("H", _IFF_TAP | _IFF_NO_PI)))
    # The namespace sees to the rest: nobody else is in it.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for number, address in ((_SIOCSIFADDR, PEER_ADDRESS), (_SIOCSIFNETMASK, NETMASK)):
            value = struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(control, number, _request(value))
        fcntl.ioctl(control, _SIOCSIFFLAGS, _request(struct.pack("H", _IFF_UP)))
    down, up = (socket.create_server((PEER_ADDRESS, port)) for port in (DOWN_PORT, UP_PORT))
    icmp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    snmp = os.open("/proc/net/snmp", os.O_RDONLY)
    descriptors = [tap, down.fileno(), up.fileno(), icmp.fileno(), snmp]
    with socket.socket(fileno=channel) as stream:
        socket.send_fds(stream, [b"\0"], descriptors)


def _request(value: bytes) -> bytes:
    """A struct ifreq of netdevice(7)."""
    return struct.pack("16s24s", _INTERFACE, value)


if __name__ == "__main__":
    _hand_out(int(sys.argv[1]))
