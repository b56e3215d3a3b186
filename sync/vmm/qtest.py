"""Port and memory accesses in a QEMU guest's place, by QEMU's qtest protocol.

Owns the line protocol (`QtestCore`, sans-IO), how a QEMU that was started without it gets a qtest
socket (`Qtest.attach`), and that socket. Does not own what is accessed. Source: QEMU's
docs/devel/testing/qtest.rst and system/qtest.c.

    inl PORT, outl PORT VALUE, ...            one access to a port
    read ADDRESS SIZE, write ADDRESS SIZE DATA    physical, in accesses that a device register takes

QEMU answers each line, in order, with `OK`, `OK VALUE` or `FAIL WHY`. Lines may be sent ahead. QEMU
takes malformed ones for bugs in a test and aborts, so only the functions here make them.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import trio
from trio.abc import AsyncResource

from sync.vmm.driver import Vmm
from sync.vmm.errors import QmpProtocolError, VmmError, VmmGone, VmmNotReady, VmmRefused

NAME = "vfio-ferry"
"""The chardev and the object are called so. QEMU takes one qtest object for its whole life, so what
an earlier migration added is used again."""
SOCKET_SUFFIX = ".qtest"
"""The socket lies beside the one for QMP: there QEMU is allowed to make it, and to keep it."""
MAX_ACCESS_BYTES = 1 << 15
"""The largest MSI-X table."""
MAX_BATCH = 4096
MAX_SOCKET_PATH_BYTES = 107
"""sun_path of unix(7) has 108 bytes with the NUL."""
REPLY_DEADLINE_S = 5.0
READ_BYTES = 1 << 16

_MAX_LINE_BYTES = 2 * MAX_ACCESS_BYTES + 64
_SOCKET = re.compile(r"(?:disconnected:)?unix:(?P<path>.+),server=on\Z")
_OUT = {1: "outb", 2: "outw", 4: "outl"}
_IN = {1: "inb", 2: "inw", 4: "inl"}


class QtestError(VmmError):
    """QEMU refused an access, or answered with what is no answer."""


def port_read(port: int, size: int) -> str:
    """Reads 1, 2 or 4 bytes; the reply is the value."""
    return f"{_IN[size]} {_bounded(port, 16):#x}"


def port_write(port: int, size: int, value: int) -> str:
    return f"{_OUT[size]} {_bounded(port, 16):#x} {_bounded(value, 8 * size):#x}"


def memory_read(address: int, size: int) -> str:
    """Reads physical memory or registers; the reply is `size` bytes."""
    _check_range(address, size)
    return f"read {address:#x} {size:#x}"


def memory_write(address: int, data: bytes) -> str:
    _check_range(address, len(data))
    return f"write {address:#x} {len(data):#x} 0x{data.hex()}"


def _bounded(value: int, bits: int) -> int:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{value:#x} has more than {bits} bits")
    return value


def _check_range(address: int, size: int) -> None:
    if not 0 < size <= MAX_ACCESS_BYTES or not 0 <= address <= (1 << 64) - size:
        raise ValueError(f"{size} bytes at {address:#x} cannot be accessed")


class QtestCore:
    """The client's half of the protocol: commands to bytes, bytes to replies."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._expected: list[str] = []

    def send(self, commands: Sequence[str]) -> bytes:
        self._expected += commands
        return "".join(f"{command}\n" for command in commands).encode()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_reply(self) -> bytes | None:
        """What the oldest unanswered command returned (big-endian for a value, empty for none), or
        None if more bytes are needed. Raises `QtestError`; the connection is of no use then."""
        end = self._buffer.find(b"\n")
        if (end if end >= 0 else len(self._buffer)) > _MAX_LINE_BYTES:
            raise QtestError("QEMU's qtest sends a line without an end")
        if end < 0:
            return None
        line = self._buffer[:end].decode("ascii", errors="replace")
        del self._buffer[: end + 1]
        if not self._expected:
            raise QtestError("QEMU's qtest answers what was not asked")
        command = self._expected.pop(0)
        words = line.split()
        if words[:1] != ["OK"] or len(words) > 2:
            raise QtestError(f"QEMU does not {command[:40]!r}: {line[:200]!r}")
        try:
            digits = words[1].removeprefix("0x") if len(words) == 2 else ""
            return bytes.fromhex("0" * (len(digits) % 2) + digits)
        except ValueError as error:
            raise QtestError(f"QEMU answers {command[:40]!r} by {line[:200]!r}") from error


class Qtest(AsyncResource):
    """A connection to a QEMU's qtest. One task at a time."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._core = QtestCore()

    @classmethod
    async def attach(cls, vmm: Vmm, qmp_path: str) -> "Qtest | None":
        """Connects to the qtest of `vmm`, which is added where there is none yet.

        None if the VMM is no QEMU. The guest does not notice. Raises `VmmRefused`, `VmmNotReady`.
        """
        try:
            chardevs = await vmm.execute("query-chardev")
        except VmmRefused as error:
            if error.error_class == "CommandNotFound":
                return None
            raise
        path = _socket_of(chardevs)
        if path is None:
            path = qmp_path + SOCKET_SUFFIX
            await _add_chardev(vmm, path)
        objects = await vmm.execute("qom-list", {"path": "/objects"})
        if NAME not in _names(objects):
            what = {"qom-type": "qtest", "id": NAME, "chardev": NAME, "log": "none"}
            await vmm.execute("object-add", what)
        try:
            return cls(await trio.open_unix_socket(path))
        except OSError as error:
            raise VmmNotReady(f"QEMU's qtest is not to be had at {path}: {error}") from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def run(self, commands: Sequence[str]) -> list[bytes]:
        """Executes `commands` without a pause between them; returns a reply for each.

        Raises `QtestError`, `VmmGone`, and `VmmNotReady` when QEMU does not answer.
        """
        if len(commands) > MAX_BATCH:
            raise ValueError(f"{len(commands)} commands are too many for one batch")
        replies: list[bytes] = []
        with trio.move_on_after(REPLY_DEADLINE_S):
            try:
                await self._stream.send_all(self._core.send(commands))
                while True:
                    while (reply := self._core.next_reply()) is not None:
                        replies.append(reply)
                    if len(replies) == len(commands):
                        return replies
                    data = await self._stream.receive_some(READ_BYTES)
                    if not data:
                        raise VmmGone("QEMU closed its qtest connection")
                    self._core.feed(bytes(data))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise VmmGone(f"QEMU's qtest connection ended: {error}") from error
        raise VmmNotReady(
            f"QEMU's qtest has not answered for {REPLY_DEADLINE_S:g} s: another client has it, or "
            "a device does not answer QEMU"
        )


async def obstacle(vmm: Vmm, qmp_path: str) -> str:
    """Why `Qtest.attach` would fail, or nothing. Adds nothing. Raises `VmmError`."""
    path = _socket_of(await vmm.execute("query-chardev"))
    if path is not None:
        return "" if os.access(path, os.R_OK | os.W_OK) else f"{path} may not be opened"
    objects = await vmm.execute("qom-list", {"path": "/objects"})
    if any(item.get("type") == "child<qtest>" for item in objects):
        return "QEMU has a qtest of somebody else's, and takes no second one"
    if "qtest" not in _names(await vmm.execute("qom-list-types", {"implements": "user-creatable"})):
        return "this QEMU was built without qtest"
    try:
        _check_socket_path(qmp_path + SOCKET_SUFFIX)
    except VmmNotReady as error:
        return str(error)
    return ""


def _check_socket_path(path: str) -> None:
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        raise VmmNotReady(
            f"{path} is longer than the path of a socket may be: give the VMM a QMP socket with a "
            f"path of at most {MAX_SOCKET_PATH_BYTES - len(SOCKET_SUFFIX)} bytes"
        )


async def _add_chardev(vmm: Vmm, path: str) -> None:
    _check_socket_path(path)
    address = {"type": "unix", "data": {"path": path}}
    socket = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    await vmm.execute("chardev-add", {"id": NAME, "backend": socket})


def _socket_of(chardevs: Any) -> str | None:
    """The path at which our chardev listens; None if it is not there."""
    if not isinstance(chardevs, list) or not all(isinstance(item, dict) for item in chardevs):
        raise QmpProtocolError("query-chardev returned no list of chardevs")
    for chardev in chardevs:
        if chardev.get("label") == NAME:
            match = _SOCKET.match(str(chardev.get("filename")))
            if match is None:
                raise VmmNotReady(f"QEMU's chardev {NAME!r} is not ours: {chardev}")
            return match["path"]
    return None


def _names(properties: Any) -> list[str]:
    if not isinstance(properties, list) or not all(isinstance(item, dict) for item in properties):
        raise QmpProtocolError("qom-list returned no list of properties")
    return [str(item.get("name")) for item in properties]
