"""What every device process does: serve one device behind one socket until it is told to end."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lab.devices.errors import DeviceError
from lab.devices.pci_device import PciDevice
from lab.vfio_user.server import Server

_END = (signal.SIGTERM, signal.SIGINT)
Work = TypeVar("Work")


def serve(build: Callable[[], PciDevice[Work]], socket_path: str | Path) -> None:
    """Build a device and serve it at `socket_path`; return after SIGTERM or SIGINT, with the device
    closed. For the main thread of a process.

    Raises `DeviceError` if the socket cannot be used, and what `build` raises.
    """
    # Who sees the socket may send a signal: from its first moment on, the signal has to end well.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _END)
    try:
        device = build()
        try:
            server = Server(socket_path, device)
        except OSError as error:
            device.close()
            raise DeviceError(f"cannot listen on {socket_path}: {error.strerror}") from error

        def end(_signal: int, _frame: object) -> None:
            server.close()

        previous = {number: signal.signal(number, end) for number in _END}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        server.serve_forever()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        device.close()
