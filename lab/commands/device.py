"""`vfio-ferry device`: the options of the virtio-blk device, and nothing else of it."""

from dataclasses import dataclass

from ferry.config import log_page, option, positive
from ferry.errors import Exit
from lab.devices.main import DeviceOptions
from lab.devices.main import run as run_device


@dataclass(frozen=True, kw_only=True)
class Options:
    socket: str = option("where its vfio-user client connects: the gateway")
    image: str = option("the disk: a file or block device of whole sectors")
    v2: bool = option("offer VFIO migration v2", False)
    logging: int | None = option("offer DMA logging with pages of this size", None, parse=log_page)
    express: bool = option("be a PCI Express device, with Advanced Error Reporting", False)
    read_only: bool = option("refuse writes", False)
    workers: int = option("threads, so also requests in flight", 4, parse=positive)
    mute: str = option(
        "failure drill: do not interrupt, or do not carry out any request",
        "",
        choices=("", "interrupts", "requests"),
    )
    serial: str = option("serial number that the guest sees", "vfio-ferry")


def run(options: Options) -> int:
    run_device(
        DeviceOptions(
            socket_path=options.socket,
            image_path=options.image,
            v2=options.v2,
            logging_page_bytes=options.logging,
            express=options.express,
            read_only=options.read_only,
            workers=options.workers,
            serial=options.serial,
            mute=options.mute,
        )
    )
    return Exit.OK
