"""What a service manager such as systemd and its service say to each other.

Owned here: readiness and the watchdog over the datagram socket `$NOTIFY_SOCKET` (sd_notify(3)), and
what the manager has opened before (sd_listen_fds(3)): listening sockets, and devices, as systemd
does for `OpenFile=`. All of it comes in the environment; without a manager nothing is there, and
nothing happens.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START."""


def notify(state: str) -> None:
    """Tells the manager `state`, such as `READY=1`. Whether it hears is no concern of ours."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # an abstract address
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
    ):
        sock.sendto(state.encode(), address)


def heartbeat() -> Callable[[float], None]:
    """What an event loop calls with its clock each time that it is alive: it tells the manager,
    twice in the time after which that takes the service for dead."""
    try:
        interval_s = int(os.environ["WATCHDOG_USEC"]) / 2e6
        for_us = int(os.environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except (KeyError, ValueError):
        return _nothing
    if not for_us or interval_s <= 0:
        return _nothing
    due = 0.0

    def beat(now: float) -> None:
        nonlocal due
        if now >= due:
            due = now + interval_s
            notify("WATCHDOG=1")

    return beat


def _nothing(_now: float) -> None:
    pass


_devices: dict[int, int] = {}
"""Character devices that the manager has passed: a descriptor by the device's number."""


def open_device(path: str) -> int:
    """A descriptor of the character device at `path`: a duplicate of the one that the manager has
    passed, if it has, for who runs this process may not be permitted to open it. Raises OSError."""
    with contextlib.suppress(OSError):
        passed = _devices.get(Path(path).stat().st_rdev)
        if passed is not None:
            return os.dup(passed)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def passed_sockets() -> dict[Path, socket.socket]:
    """The listening UNIX sockets that the manager has passed, by their paths. They are this
    process's alone from here on: children do not get them, and a second call finds none. Devices
    that were passed are kept for `open_device`."""
    found: dict[Path, socket.socket] = {}
    try:
        for_us = int(os.environ.pop("LISTEN_PID", "0")) == os.getpid()
        count = int(os.environ.pop("LISTEN_FDS", "0"))
    except ValueError:
        return found
    if not for_us:
        return found
    for number in range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count):
        os.set_inheritable(number, False)
        status = os.fstat(number)
        if stat.S_ISCHR(status.st_mode):
            _devices[status.st_rdev] = number
        if not stat.S_ISSOCK(status.st_mode):
            continue
        sock = socket.socket(fileno=number)
        name = sock.getsockname()
        if sock.family != socket.AF_UNIX or not isinstance(name, str) or not name:
            sock.close()
            continue
        found[Path(name)] = sock
    return found
