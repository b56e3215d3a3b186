"""The device process: one virtio-blk device behind one socket, until SIGTERM or SIGINT."""

from dataclasses import dataclass
from pathlib import Path

from lab.devices.dirty_log import is_page_size
from lab.devices.disk import Disk
from lab.devices.errors import DeviceError
from lab.devices.process import serve
from lab.devices.virtio.blk import VirtioBlk

MAX_WORKERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """What a device is and offers."""

    socket_path: str | Path
    """Where its vfio-user client connects; created with mode 0600."""
    image_path: str | Path
    """The disk: a file or block device of whole sectors."""
    v2: bool = False
    """Offer VFIO migration v2."""
    logging_page_bytes: int | None = None
    """Offer DMA logging with pages of this size, a power of two, 4 KiB to 2 MiB. None: do not."""
    read_only: bool = False
    workers: int = 4
    """Threads, so also requests in flight."""
    queues: int = 1
    express: bool = False
    """A PCI Express device with Advanced Error Reporting, instead of conventional PCI."""
    serial: str = "vfio-ferry"
    """What the guest sees as the disk's serial number; up to 20 ASCII characters."""
    mute: str = ""
    """What it does not do: "interrupts", or "requests"."""

    def __post_init__(self) -> None:
        page = self.logging_page_bytes
        if page is not None and not is_page_size(page):
            raise DeviceError(f"DMA logging has pages of 4 KiB to 2 MiB, a power of two: {page}")
        if not 1 <= self.workers <= MAX_WORKERS:
            raise DeviceError(f"a device has 1 to {MAX_WORKERS} workers, not {self.workers}")


def build(options: DeviceOptions) -> VirtioBlk:
    """The device that `options` describe. Raises `DeviceError`."""
    disk = Disk(options.image_path, read_only=options.read_only)
    try:
        device = VirtioBlk(
            disk,
            serial=options.serial,
            n_queues=options.queues,
            n_workers=options.workers,
            v2=options.v2,
            logging_page_bytes=options.logging_page_bytes,
            express=options.express,
        )
        device.mute = options.mute
        return device
    except DeviceError:
        disk.close()
        raise


def run(options: DeviceOptions) -> None:
    """Serve the device; return after SIGTERM or SIGINT. For the main thread of a process.

    Raises `DeviceError` if an option, the image or the socket cannot be used.
    """
    serve(lambda: build(options), options.socket_path)
