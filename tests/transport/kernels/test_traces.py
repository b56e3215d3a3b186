"""Recorded guests, through encoder and decoder and through sender and receiver: after each round
the target's memory is the recorded one."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from transport.receiving.decoder import Decoder
from transport.sending.encoder import Encoder
from transport.sending.replica import Replica
from transport.wire.frames import DEFAULT_FRAME_BYTES

TRACES = Path(__file__).parents[4] / "shared" / "traces"
SEED = 42


def load(name: str) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]], list[str]]:
    """The memory at first (flat), the rounds, and the digest of the memory after each."""
    if not (TRACES / name).exists():
        pytest.skip(f"no {name} beside the checkout")
    pytest.importorskip("zstandard")
    spec = importlib.util.spec_from_file_location("load_trace", TRACES / "load_trace.py")
    assert spec is not None
    assert spec.loader is not None
    loader: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    archive = loader._open(TRACES / name)
    base, rounds = loader.load_trace(TRACES / name, archive)
    return base.reshape(-1), rounds, loader.load_meta(TRACES / name, archive)["sha256"]


# The most that the 12 rounds may take on the wire, of the raw size of their pages.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "most"),
    [
        pytest.param("nvme-randrw.trace.zst", 0.49, marks=pytest.mark.full),
        ("sqlite.trace.zst", 0.23),
    ],
)
def test_a_recorded_guest_arrives(name: str, most: float) -> None:
    memory, rounds, digests = load(name)
    n_pages = memory.size // 4096
    target = np.zeros_like(memory)
    encoder = Encoder(memory, Replica(n_pages, 256 << 20), SEED)
    decoder = Decoder(target, n_pages, SEED)
    out = np.empty(DEFAULT_FRAME_BYTES, np.uint8)

    def send(indices: np.ndarray, round_no: int) -> int:
        start = sent_bytes = 0
        while start < indices.size:
            done = encoder.encode(
                indices, start, out, round_no=round_no, sequence=decoder.next_sequence
            )
            start += done.consumed
            sent_bytes += done.n_bytes
            if done.n_bytes:
                assert decoder.apply(out.data[: done.n_bytes]).rejected.size == 0
        return sent_bytes

    send(np.arange(n_pages, dtype=np.uint32), 0)
    assert hashlib.sha256(target.data).hexdigest() == digests[0]
    raw_bytes = wire_bytes = 0
    for round_no, (indices, pages) in enumerate(rounds, 1):
        memory.reshape(-1, 4096)[indices] = pages
        wire_bytes += send(indices, round_no)
        raw_bytes += pages.nbytes
        assert hashlib.sha256(target.data).hexdigest() == digests[round_no]
    assert wire_bytes < most * raw_bytes


@pytest.mark.timeout(600)  # hashing all of the memory 26 times takes a while
@pytest.mark.parametrize(
    "name", [pytest.param("nvme-randrw.trace.zst", marks=pytest.mark.full), "sqlite.trace.zst"]
)
def test_a_recorded_guest_arrives_over_the_link(name: str, link_pair: Any) -> None:
    memory, rounds, digests = load(name)
    n_pages = memory.size // 4096

    async def migrate() -> None:
        async with link_pair(n_pages=n_pages, cache_bytes=64 << 20) as pair:
            pair.source[:] = memory
            everything = np.arange(n_pages, dtype=np.uint32)
            await pair.sender.send_round(everything, 0)
            assert hashlib.sha256(pair.target).hexdigest() == digests[0]
            for round_no, (indices, pages) in enumerate(rounds, 1):
                pair.source.reshape(-1, 4096)[indices] = pages
                done = await pair.sender.send_round(indices.astype(np.uint32), round_no)
                assert done.done_pages == indices.size
                assert hashlib.sha256(pair.target).hexdigest() == digests[round_no]
            assert (await pair.sender.verify()).size == 0

    trio.run(migrate)
