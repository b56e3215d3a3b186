"""The NIC process: one 82540EM behind one socket, its cable at another, until SIGTERM or SIGINT."""

import re
from dataclasses import dataclass
from pathlib import Path

from lab.devices.dirty_log import is_page_size
from lab.devices.e1000.cable import SocketLink
from lab.devices.e1000.nic import E1000
from lab.devices.errors import DeviceError
from lab.devices.process import serve

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
    serve(lambda: build(options), options.socket_path)
