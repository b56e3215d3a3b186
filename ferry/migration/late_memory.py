"""Guest memory that the target's VMM shows only once the guest is there.

A BAR of shared memory (ivshmem-plain) is mapped when the guest's driver has switched it on, blocks
of virtio-mem when the guest has plugged them: until the VMM has loaded its stream, no gateway knows
their files. What a device wrote there is received into a file that stands in, and put into its
place then. Pages that come in while that is done may be torn; the comparison of both memories,
which comes after it, finds and repairs them.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence

import trio

from ferry.errors import Mismatch
from ferry.migration.devices import memory_of
from ferry.migration.memory_layout import MemoryLayout, late_files, same_pages
from sync.gateway.control.client import GatewayClient
from sync.memory import PAGE_BYTES, GuestMemory, MemoryRegion
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmRefused

_PIECE_BYTES = 1 << 20


async def check_late_files(vmm: Vmm, gateway: GatewayClient, theirs: MemoryLayout) -> None:
    """Raises `Mismatch` if a file of `theirs` is not mapped here and `vmm` has none of its size."""
    async with memory_of(gateway) as regions:
        late = late_files(theirs, regions)
        known = Counter(MemoryLayout.of(regions).files)
    if not late:
        return
    try:
        backends = await vmm.execute("query-memdev")
        known.subtract(int(each["size"]) for each in backends if each.get("share"))
    except (VmmRefused, KeyError, TypeError):
        known.clear()
    for file in late:
        size = theirs.files[file]
        known[size] += 1
        if known[size] > 0 or theirs.page_bytes[file] != PAGE_BYTES:
            raise Mismatch(
                f"{size >> 20} MiB of the source's memory have no place in the VMM here: start the "
                "VMM with the same memory"
            )


def stand_ins(theirs: MemoryLayout, ours: Sequence[MemoryRegion]) -> dict[int, int]:
    """A descriptor of an empty file for each file of `theirs` that is not mapped here yet."""
    made = {}
    for file in late_files(theirs, ours):
        made[file] = os.memfd_create("stand-in", os.MFD_CLOEXEC)
        os.ftruncate(made[file], theirs.files[file])
    return made


class LateMemory:
    """Owns `files`, the stand-ins by the number of the file."""

    def __init__(
        self,
        gateway: GatewayClient,
        theirs: MemoryLayout,
        memory: GuestMemory,
        files: dict[int, int],
    ) -> None:
        self._gateway = gateway
        self._theirs = theirs
        self._memory = memory
        self._files = files

    async def arrive(self) -> None:
        """The VMM has loaded its stream: what came so far goes to its place, and what comes from
        now on does at once. Raises `Mismatch` if the VMM has no such memory after all."""
        if not self._files:
            return
        async with memory_of(self._gateway) as regions:
            pages = same_pages(self._theirs, regions)
            for region, (_, _, file, _) in zip(pages, self._theirs.regions, strict=True):
                if file in self._files:
                    self._memory.replace(region)
            for file, fd in self._files.items():
                (target, *_) = (
                    region.fd
                    for region, row in zip(pages, self._theirs.regions, strict=True)
                    if row[2] == file
                )
                await trio.to_thread.run_sync(_copy_data, fd, target)
        self.close()

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files = {}


def _copy_data(source: int, target: int) -> None:
    """Copies what was ever written to `source`; both are of one size."""
    for start, end in _data(source):
        for at in range(start, end, _PIECE_BYTES):
            os.pwrite(target, os.pread(source, min(_PIECE_BYTES, end - at), at), at)


def _data(fd: int) -> Iterator[tuple[int, int]]:
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return  # there is no more
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
