"""The NIC process: one 82540EM behind one socket, its cable at another, until SIGTERM or SIGINT."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from sync.devices.dirty_log import is_page_size
from sync.devices.e1000 import E1000
from sync.devices.e1000_link import SocketLink
from sync.devices.errors import DeviceError
from sync.vfio_user.server import Server

_END = (signal.SIGTERM, signal.SIGINT)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class NicOptions:
    """What a NIC is and offers."""

    socket_path: str | Path
    """Where its vfio-user client connects; created with mode 0600."""
    link_path: str | Path
    """Where the other end of its cable listens: a SOCK_SEQPACKET socket, one frame a message."""
    mac: str = "52:54:00:12:34:56"
    """Its address. A guest that migrates needs a device with the same one."""
    logging_page_bytes: int | None = None
    """Offer DMA logging with pages of this size, a power of two, 4 KiB to 2 MiB. None: do not."""

    def __post_init__(self) -> None:
        page = self.logging_page_bytes
        if page is not None and not is_page_size(page):
            raise DeviceError(f"DMA logging has pages of 4 KiB to 2 MiB, a power of two: {page}")
        if _MAC.fullmatch(self.mac) is None:
            raise DeviceError(f"an address looks like 52:54:00:12:34:56, not like {self.mac!r}")


def build(options: NicOptions) -> E1000:
    """The device that `options` describe. Raises `DeviceError`."""
    return E1000(
        SocketLink(options.link_path),
        bytes.fromhex(options.mac.replace(":", "")),
        logging_page_bytes=options.logging_page_bytes,
    )


def run(options: NicOptions) -> None:
    """Serve the device; return after SIGTERM or SIGINT. For the main thread of a process.

    Raises `DeviceError` if an option or the socket cannot be used.
    """
    # Who sees the socket may send a signal: from its first moment on, the signal has to end well.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _END)
    try:
        device = build(options)
        try:
            server = Server(options.socket_path, device)
        except OSError as error:
            device.close()
            raise DeviceError(f"cannot listen on {options.socket_path}: {error}") from error

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
