"""What the tests of mediation do to a bench: mediate it, and be its guest."""

import os

from sync.gateway.control.requests import Mediate
from sync.gateway.engine import jobs
from sync.registers.record import (
    Access,
    Op,
    unpack_accesses,
)
from sync.vfio_user.protocol import (
    Command,
    RegionAccess,
)

PAGE = 4096
SELECTOR, BANKED, COUNTER = 0x10, 0x14, 0x20


def reading(offset: int, size: int = 4, region: int = 0) -> Access:
    return Access(Op.READ, region, offset, size)


def writing(offset: int, value: int, *, back: bool = False, region: int = 0) -> Access:
    data = value.to_bytes(4, "little")
    return Access(Op.WRITE, region, offset, 4, data, write_back=back)


def mediating(bench, tracker="none", *, capture=True, snapshot=b"", page=PAGE):
    """The job that `mediate` runs."""
    request = Mediate(tracker, page, capture, snapshot)
    return jobs.mediate(bench.link, bench.custody, request)


def mediate(bench, *arguments, **options):
    return bench.job(mediating(bench, *arguments, **options), held=True)


def restore(bench) -> None:
    bench.job(jobs.restore(bench.link, bench.custody), held=True)


def guest_read(bench, offset: int, size: int = 4, region: int = 0) -> int:
    return bench.vmm(Command.REGION_READ, RegionAccess(offset, region, size).pack())


def guest_write(bench, offset: int, data: bytes, *, posted=False, region: int = 0) -> int:
    body = RegionAccess(offset, region, len(data), data).pack()
    return bench.vmm(Command.REGION_WRITE, body, posted=posted)


def take_journal(bench) -> list[Access]:
    return list(unpack_accesses(bench.link.journal.take(1 << 20)))


def take_dirty_pages(bench) -> set[int]:
    bitmap = bench.link.service.bitmap
    collected = bench.job(jobs.dirty(bench.link))
    start = collected.half * bitmap.half_bytes
    data = os.pread(bitmap.descriptor, bitmap.half_bytes, start)
    os.pwrite(bitmap.descriptor, bytes(bitmap.half_bytes), start)
    assert collected.complete
    bits = int.from_bytes(data, "little")
    return {page for page in range(len(data) * 8) if bits >> page & 1}
