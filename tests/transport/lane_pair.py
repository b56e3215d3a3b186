"""An encoder and a decoder on memories that are rewritten, for the tests of both."""

from collections.abc import Iterator

import numpy as np
import xxhash

from transport.kernels.digests import digest_all
from transport.receiving.decoder import Applied, Decoder
from transport.sending.encoder import EncodedFrame, Encoder
from transport.sending.replica import Replica
from transport.wire.frames import DEFAULT_FRAME_BYTES

SEED = 0x0123456789ABCDEF
N_PAGES = 200  # several stripes
KINDS = ("zero", "raw", "lz4", "delta", "lz4_base", "copy")


class LanePair:
    """One lane's encoder and decoder, with nothing between them."""

    def __init__(
        self,
        source: np.ndarray,
        target: np.ndarray,
        replica: Replica,
        lane: int = 0,
        frame_bytes: int = DEFAULT_FRAME_BYTES,
    ) -> None:
        self.encoder = Encoder(source, replica, SEED, lane=lane, frame_bytes=frame_bytes)
        self.decoder = Decoder(target, replica.n_pages, SEED, lane=lane, lanes=replica.lanes)
        self.target = target
        self.out = np.empty(frame_bytes, np.uint8)
        self.sequence = 0

    def frames(
        self, indices: np.ndarray, round_no: int = 0, *, full: bool = False
    ) -> Iterator[tuple[EncodedFrame, bytes]]:
        start = 0
        while start < indices.size:
            done = self.encoder.encode(
                indices, start, self.out, round_no=round_no, sequence=self.sequence, full=full
            )
            assert done.consumed > 0
            assert done.consumed == done.same + done.n_pages
            assert done.n_pages == sum(getattr(done, kind) for kind in KINDS)
            assert bool(done.n_bytes) == bool(done.n_pages)
            start += done.consumed
            if done.n_bytes:
                self.sequence += 1
                yield done, self.out[: done.n_bytes].tobytes()

    def send(self, indices: np.ndarray, round_no: int = 0) -> list[Applied]:
        return [self.decoder.apply(frame) for _, frame in self.frames(indices, round_no)]

    def holds_what_the_sender_believes(self) -> bool:
        known = self.encoder.replica.knowledge_of_lane(0).digests
        return np.array_equal(known, digest_all(self.target, SEED))

    def send_one(self, page: int, *, full: bool = False) -> tuple[str | None, Applied | None]:
        """The kind in which the page went (None: the receiver has it), and what came of it."""
        sent = list(self.frames(np.array([page], np.uint32), full=full))
        if not sent:
            return None, None
        ((done, frame),) = sent
        (kind,) = [kind for kind in KINDS if getattr(done, kind)]
        return kind, self.decoder.apply(frame)


def pair(
    n_pages: int = N_PAGES, cache_pages: int = N_PAGES
) -> tuple[LanePair, np.ndarray, np.ndarray]:
    source, target = np.zeros((2, n_pages * 4096), np.uint8)
    lane = LanePair(source, target, Replica(n_pages, cache_pages * 4096))
    return lane, source.reshape(-1, 4096), target.reshape(-1, 4096)


def rewrite(page: np.ndarray, how: str, number: int) -> None:
    """Give a page (uint8, 4096) new content of some sort."""
    rng = np.random.default_rng(number)
    if how == "zero":
        page[:] = 0
    elif how == "random":
        page[:] = rng.integers(0, 256, 4096, np.uint8)
    elif how == "shared":  # of few contents, so that others have it, too
        page[:] = np.random.default_rng(number % 3).integers(0, 256, 4096, np.uint8)
    elif how == "text":
        page[:] = np.frombuffer((b"%d pages were sent. " % number * 400)[:4096], np.uint8)
    elif how == "byte":
        page[rng.integers(4096)] += 1
    elif how == "scattered":
        page[rng.integers(0, 4096, rng.integers(1, 600))] += 1
    elif how == "stretch":
        first, last = sorted(rng.integers(0, 4097, 2))
        page[first:last] = rng.integers(0, 256, last - first, np.uint8)
    elif how == "moved":
        page[:] = np.roll(page, rng.integers(4096))


REWRITES = [
    *("zero", "random", "shared", "text", "byte", "scattered", "stretch", "moved", "not at all")
]


def lane_of(page: int, lanes: int) -> int:
    """The lane that carries `page`, of which 64 neighbours keep together."""
    return page // 64 % lanes


def check_cache(replica: Replica) -> None:
    """Slots and pages name each other, and a slot holds what the digest says."""
    for lane in range(replica.lanes):
        known = replica.knowledge_of_lane(lane)
        held = {int(page): slot for slot, page in enumerate(known.owners) if page != 0xFFFFFFFF}
        assert all(lane_of(page, replica.lanes) == lane for page in held)
        assert all(known.slots[page] == slot + 1 for page, slot in held.items())
        for page, slot in held.items():
            content = known.cache[slot * 512 : (slot + 1) * 512].tobytes()
            if known.digests[page]:
                assert known.digests[page] == xxhash.xxh3_64_intdigest(content, SEED)
        of_lane = [p for p in range(replica.n_pages) if lane_of(p, replica.lanes) == lane]
        if known.slots.size:
            assert sum(known.slots[of_lane] != 0) == len(held)
