"""The controller process: one NVMe controller behind one socket, until SIGTERM or SIGINT."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lab.devices.disk import Disk
from lab.devices.errors import DeviceError
from lab.devices.nvme.controller import NvmeController
from lab.devices.process import serve


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeOptions:
    """What a controller is and offers."""

    socket_path: str | Path
    """Where its vfio-user client connects; created with mode 0600."""
    image_paths: Sequence[str | Path]
    """Its namespaces, from 1 on: files or block devices of whole sectors."""
    serial: str = "vfio-ferry"
    controller_id: int = 0
    queues: int = 4
    logging_page_bytes: int | None = None


def build(options: NvmeOptions) -> NvmeController:
    """The controller that `options` describe. Raises `DeviceError`."""
    if not options.image_paths:
        raise DeviceError("a controller needs an image for its namespace")
    with ExitStack() as opened:
        disks = []
        for path in options.image_paths:
            disks.append(Disk(path))
            opened.callback(disks[-1].close)
        controller = NvmeController(
            disks,
            serial=options.serial,
            controller_id=options.controller_id,
            n_queues=options.queues,
            logging_page_bytes=options.logging_page_bytes,
        )
        opened.pop_all()
    return controller


def run(options: NvmeOptions) -> None:
    """Serve the controller; return after SIGTERM or SIGINT. For the main thread of a process.

    Raises `DeviceError` if an option, an image or the socket cannot be used.
    """
    serve(lambda: build(options), options.socket_path)
