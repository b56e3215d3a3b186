"""A check (`send --check`) once the receiver has said that it would work: what the link is like.

Owns the short measurement that both sides make of it, and what the source tells. The pages are
random and belong to nobody: what is measured is the link with the frames, lanes and limit that a
migration has, at its worst.
"""

import contextlib
import mmap
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import trio
from numpy.typing import NDArray

from ferry.findings import Finding, ok
from ferry.migration.messages import PROBES, MessageKind, Notice
from ferry.progress import bytes_text
from sync.memory import PAGE_BYTES
from sync.vmm.identity import VmmIdentity
from transport.receiver import Receiver
from transport.sender import Sender
from transport.wire.errors import PeerClosed

SAMPLE_PAGES = 4096
FIRST_PAGES = 64
"""A slow link shows with so many; each round after that has four times as many."""
GROWTH = 4
ENOUGH_S = 0.1
"""A round of this length tells the rate."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a check has measured of the link."""

    round_trip_s: float
    """The shortest of a few, of a record to the receiver's transport and back."""
    bytes_per_s: float


def scratch(fill: bytes = b"") -> NDArray[np.uint8]:
    """Memory for a check's pages, of the same size on both sides, with `fill` at its beginning."""
    pages = mmap.mmap(-1, SAMPLE_PAGES * PAGE_BYTES)
    pages.write(fill)
    return np.frombuffer(pages, np.uint8)


def findings_of(link: Sender, vmm: VmmIdentity, n_pages: int, sample: Sample) -> list[Finding]:
    """What the source reports of a check that went well; `n_pages` is the size of guest memory."""
    peer = Notice.unpack(link.hello_reply).text("vmm")
    memory_bytes = n_pages * PAGE_BYTES
    return [
        ok("memory", f"{bytes_text(memory_bytes)} that devices can reach, laid out alike"),
        ok("VMM", f"{vmm} here, {peer} there"),
        ok(
            "link",
            f"round trip {sample.round_trip_s * 1e3:.2f} ms, {bytes_text(sample.bytes_per_s)}/s "
            "with pages that cannot be compressed: all of the memory in about "
            f"{memory_bytes / sample.bytes_per_s:.1f} s",
        ),
    ]


def stream_finding(why_closed: str) -> Finding:
    """How the VMM's own stream would be carried."""
    if why_closed:
        return ok("VMM's stream", f"carried as it is: {why_closed}")
    return ok("VMM's stream", "opened: all of the guest's memory takes the lanes")


async def answer_check(
    link: Receiver, vmm: VmmIdentity, hear_out: Callable[[], Awaitable[None]]
) -> None:
    """Answers that a migration would work, then takes the source's sample pages until it says
    goodbye; `hear_out` reads its messages meanwhile.

    Raises `TransportError` and what `hear_out` does.
    """
    await link.accept(Notice({"vmm": str(vmm)}).pack())
    link.attach_memory(scratch())
    with contextlib.suppress(PeerClosed):
        await hear_out()


async def measure(link: Sender) -> Sample:
    """Measures the link from the source: round trip and rate. Raises `TransportError`."""
    round_trips = []
    for _ in range(PROBES):
        began = trio.current_time()
        await link.send_record(MessageKind.PROBE, b"", flush=True)
        round_trips.append(trio.current_time() - began)
    link.attach_memory(scratch(os.urandom(SAMPLE_PAGES * PAGE_BYTES)), cache_bytes=0)
    # What a lane does for the first time takes longer than ever after.
    await link.send_round(np.arange(FIRST_PAGES, dtype=np.uint32), 0)
    first, count, round_no = FIRST_PAGES, FIRST_PAGES, 1
    while True:
        indices = np.arange(first, min(first + count, SAMPLE_PAGES), dtype=np.uint32)
        duration_s = (await link.send_round(indices, round_no)).duration_ns / 1e9
        first += indices.size
        if duration_s >= ENOUGH_S or first == SAMPLE_PAGES:
            return Sample(min(round_trips), indices.size * PAGE_BYTES / duration_s)
        count, round_no = count * GROWTH, round_no + 1
