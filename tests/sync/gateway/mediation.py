"""What the tests of mediation do to a bench: mediate it, and be its guest."""

import os
from typing import Any

from sync.gateway.control.requests import Mediate, Mediation, Tracker
from sync.gateway.engine import jobs
from sync.gateway.engine.job_runner import Job
from sync.registers.record import (
    Access,
    Op,
    unpack_accesses,
)
from sync.vfio_user.protocol import (
    Command,
    RegionAccess,
)
from tests.sync.gateway.conftest import Bench

PAGE = 4096
SELECTOR, BANKED, COUNTER = 0x10, 0x14, 0x20


def reading(offset: int, size: int = 4, region: int = 0) -> Access:
    return Access(Op.READ, region, offset, size)


def writing(offset: int, value: int, *, back: bool = False, region: int = 0) -> Access:
    data = value.to_bytes(4, "little")
    return Access(Op.WRITE, region, offset, 4, data, write_back=back)


def mediating(
    bench: Bench,
    tracker: Tracker = "none",
    *,
    capture: bool = True,
    snapshot: bytes = b"",
    page: int = PAGE,
) -> Job[Mediation]:
    """The job that `mediate` runs."""
    request = Mediate(tracker, page, capture, snapshot)
    return jobs.mediate(bench.link, bench.custody, request)


def mediate(bench: Bench, *arguments: Any, **options: Any) -> Mediation:
    mediation: Mediation = bench.job(mediating(bench, *arguments, **options), held=True)
    return mediation


def restore(bench: Bench) -> None:
    bench.job(jobs.restore(bench.link, bench.custody), held=True)


def guest_read(bench: Bench, offset: int, size: int = 4, region: int = 0) -> int:
    return bench.vmm(Command.REGION_READ, RegionAccess(offset, region, size).pack())


def guest_write(
    bench: Bench, offset: int, data: bytes, *, posted: bool = False, region: int = 0
) -> int:
    body = RegionAccess(offset, region, len(data), data).pack()
    return bench.vmm(Command.REGION_WRITE, body, posted=posted)


def take_journal(bench: Bench) -> list[Access]:
    return list(unpack_accesses(bench.link.journal.take(1 << 20)))


def take_dirty_pages(bench: Bench) -> set[int]:
    bitmap = bench.link.service.bitmap
    collected = bench.job(jobs.dirty(bench.link))
    start = collected.half * bitmap.half_bytes
    data = os.pread(bitmap.descriptor, bitmap.half_bytes, start)
    os.pwrite(bitmap.descriptor, bytes(bitmap.half_bytes), start)
    assert collected.complete
    bits = int.from_bytes(data, "little")
    return {page for page in range(len(data) * 8) if bits >> page & 1}
