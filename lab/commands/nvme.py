"""`vfio-ferry nvme`: the options of the NVMe controller, and nothing else of it."""

from dataclasses import dataclass

from ferry.config import log_page, natural, option, positive
from ferry.errors import Exit
from lab.devices.nvme.main import NvmeOptions
from lab.devices.nvme.main import run as run_device


@dataclass(frozen=True, kw_only=True)
class Options:
    socket: str = option("where its vfio-user client connects: the gateway")
    image: tuple[str, ...] = option(
        "a namespace, from 1 on: a file or block device of whole sectors", (), repeat=True
    )
    serial: str = option("serial number; the same on both hosts", "vfio-ferry")
    controller_id: int = option("its number in the subsystem", 0, parse=natural)
    queues: int = option("I/O queues that a driver may make", 4, parse=positive)
    logging: int | None = option("offer DMA logging with pages of this size", None, parse=log_page)


def run(options: Options) -> int:
    run_device(
        NvmeOptions(
            socket_path=options.socket,
            image_paths=options.image,
            serial=options.serial,
            controller_id=options.controller_id,
            queues=options.queues,
            logging_page_bytes=options.logging,
        )
    )
    return Exit.OK
