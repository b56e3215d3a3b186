"""`vfio-ferry nic`: the options of the e1000 device, and nothing else of it."""

from dataclasses import dataclass

from ferry.config import log_page, option
from ferry.errors import Exit
from lab.devices.e1000.main import NicOptions
from lab.devices.e1000.main import run as run_device


@dataclass(frozen=True, kw_only=True)
class Options:
    socket: str = option("where its vfio-user client connects: the gateway")
    link: str = option("the other end of its cable: a SOCK_SEQPACKET socket that listens there")
    mac: str = option("its address; the same on both hosts", "52:54:00:12:34:56")
    logging: int | None = option("offer DMA logging with pages of this size", None, parse=log_page)


def run(options: Options) -> int:
    run_device(
        NicOptions(
            socket_path=options.socket,
            link_path=options.link,
            mac=options.mac,
            logging_page_bytes=options.logging,
        )
    )
    return Exit.OK
