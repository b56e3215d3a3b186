"""`vfio-ferry guest`: the options of the small guest, and nothing else of it."""

from dataclasses import dataclass
from typing import Literal

from ferry.config import natural, option, positive, share, size
from ferry.errors import Exit
from lab.guest.main import run as run_guest
from lab.guest.options import GuestOptions, default_content

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str = option("vfio-user socket of its device: the gateway's --listen")
    qmp: str = option("where it listens for QMP")
    incoming: bool = option("wait for a migration, as QEMU's -S -incoming defer", False)
    low_size: int = option("RAM below the PCI hole", 32 * MIB, parse=size)
    high_size: int = option("RAM from 4 GiB on", 96 * MIB, parse=size)
    disk: Literal["virtio-blk", "nvme"] = option(
        "what its device is", "virtio-blk", choices=("virtio-blk", "nvme")
    )
    irq: Literal["msix", "intx"] = option(
        "how the device interrupts", "msix", choices=("msix", "intx")
    )
    queue_depth: int = option("requests in flight", 16, parse=positive)
    block_size: int = option("bytes of a request, 4K to 64K", 16 << 10, parse=size)
    blocks: int = option("working set on the disk, in blocks", 2048, parse=positive)
    read_share: float = option("share of reads", 0.6, parse=share)
    iops: int = option("requests a second; 0: as many as the device takes", 0, parse=natural)
    read_area: int = option("RAM that the device's reads land in", 64 * MIB, parse=size)
    cpu_pages: int = option("pages a second that the CPU writes", 200, parse=natural)
    content: tuple[str, ...] = option(
        "files or folders that what is written is made of (default: Python's library, /usr)",
        (),
        repeat=True,
    )
    seed: int = option("of the workload's choices", 1, parse=natural)
    switch_when_clean: bool = option(
        "when it migrates, pause by itself once nothing is dirty, as QEMU does", False
    )


def run(options: Options) -> int:
    run_guest(
        GuestOptions(
            device_path=options.device,
            qmp_path=options.qmp,
            incoming=options.incoming,
            low_bytes=options.low_size,
            high_bytes=options.high_size,
            disk=options.disk,
            irq=options.irq,
            queue_depth=options.queue_depth,
            block_bytes=options.block_size,
            blocks=options.blocks,
            read_share=options.read_share,
            iops=options.iops,
            read_area_bytes=options.read_area,
            cpu_pages_per_s=options.cpu_pages,
            content=options.content or default_content(),
            seed=options.seed,
            switch_when_clean=options.switch_when_clean,
        )
    )
    return Exit.OK
