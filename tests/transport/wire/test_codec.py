"""The choice of a codec by name, and what it makes of the pages of a frame."""

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from transport.receiving.decoder import Decoder
from transport.sender import SenderOptions
from transport.sending.encoder import EncodedFrame, Encoder
from transport.sending.replica import Replica
from transport.wire.codec import DELTA, LZ4, NONE, Codec, Method, Packer
from transport.wire.frames import DEFAULT_FRAME_BYTES, HEADER_BYTES, Coding

SEED = 11
N_PAGES = 100
CODING_OFFSET = 35
EVERYTHING = np.arange(N_PAGES, dtype=np.uint32)


@pytest.mark.parametrize("name", ["none", "delta", "lz4", "zstd:1", "zstd:19", "zstd:-7", "zstd:0"])
def test_a_codec_has_a_name(name: str) -> None:
    assert str(Codec.parse(name)) == name


@pytest.mark.parametrize(
    "name", ["", "zstd", "zstd:", "zstd:20", "zstd:-8", "zstd:1.5", "lz4:1", "delta:1"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"lz4|level"):
        Codec.parse(name)


class Pages:
    """Source, target, and what lies between; frames are applied at once."""

    def __init__(self) -> None:
        self.source, self.target = np.zeros((2, N_PAGES * 4096), np.uint8)
        self.encoder = Encoder(self.source, Replica(N_PAGES, N_PAGES * 4096), SEED)
        self.decoder = Decoder(self.target, N_PAGES, SEED)

    def send(self, codec: Codec) -> tuple[EncodedFrame, int]:
        """All pages, in one frame; returns how, and the coding in the frame's header."""
        self.encoder.codec = codec
        out = np.empty(DEFAULT_FRAME_BYTES, np.uint8)
        sequence = self.decoder.next_sequence
        done = self.encoder.encode(EVERYTHING, 0, out, round_no=0, sequence=sequence)
        assert done.consumed == N_PAGES
        assert self.decoder.apply(out.data[: done.n_bytes]).rejected.size == 0
        assert np.array_equal(self.source, self.target)
        return done, int(out[CODING_OFFSET])


def words(seed: int) -> np.ndarray:
    """Content in which compression finds something, different for each seed."""
    rng = np.random.default_rng(seed)
    vocabulary = rng.integers(0, 256, (64, 8), np.uint8)
    return vocabulary[rng.integers(0, 64, N_PAGES * 512)].reshape(-1)


def test_without_a_codec_pages_go_as_they_are() -> None:
    pages = Pages()
    for seed in range(2):
        pages.source[:] = words(seed)
        done, coding = pages.send(NONE)
        assert (done.raw, coding) == (N_PAGES, Coding.RAW)


def test_deltas_alone_leave_everything_else_as_it_is() -> None:
    pages = Pages()
    pages.source[:] = words(0)
    assert pages.send(DELTA)[0].raw == N_PAGES
    pages.source.reshape(N_PAGES, -1)[:50, 100:300] += 1
    pages.source[50 * 4096 :] = words(1)[50 * 4096 :]
    done, coding = pages.send(DELTA)
    assert (done.delta, done.raw, coding) == (50, 50, Coding.PLAIN)
    assert done.n_bytes < 50 * 4096 + 50 * 250 + 2000


@pytest.mark.parametrize("codec", [DELTA, LZ4, Codec(Method.ZSTD, 3)])
def test_what_is_written_to_a_page_of_zeros_is_a_delta_without_a_cache(codec: Codec) -> None:
    source, target = np.zeros((2, N_PAGES * 4096), np.uint8)
    encoder, decoder = Encoder(source, Replica(N_PAGES, 0), SEED), Decoder(target, N_PAGES, SEED)
    encoder.codec = codec
    out = np.empty(DEFAULT_FRAME_BYTES, np.uint8)
    for sequence in range(2):
        done = encoder.encode(EVERYTHING, 0, out, round_no=0, sequence=sequence)
        decoder.apply(out.data[: done.n_bytes])
        assert np.array_equal(source, target)
        assert (done.zero, done.delta) == ((N_PAGES, 0), (0, N_PAGES))[sequence]
        written = np.random.default_rng(5).integers(1, 256, (N_PAGES, 100), np.uint8)
        source.reshape(N_PAGES, -1)[:, 1000:1100] = written


def test_a_higher_level_makes_pages_smaller() -> None:
    code = Path(
        importlib.import_module("numpy._core._multiarray_umath").__file__ or ""
    ).read_bytes()
    body = np.frombuffer(code, np.uint8, 255 * 4096)
    sizes = [len(Packer().pack(body, level)) for level in (-1, 1, 2, 3, 4, 5, 9)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(small < 0.999 * large for large, small in itertools.pairwise(sizes))


def test_zstandard_finds_what_pages_have_in_common() -> None:
    sizes = []
    for codec in (LZ4, Codec(Method.ZSTD, 1), Codec(Method.ZSTD, 6)):
        pages = Pages()
        page = np.random.default_rng(1).integers(0, 256, 4096, np.uint8)
        pages.source[:] = np.tile(page, N_PAGES)
        pages.source.reshape(-1, 4096)[:, 0] = EVERYTHING
        done, in_header = pages.send(codec)
        sizes.append(done.n_bytes)
        assert done.n_pages == N_PAGES
        assert in_header == (Coding.ZSTD if codec.method is Method.ZSTD else Coding.PLAIN)
    assert sizes[0] > N_PAGES * 4000
    assert max(sizes[1:]) < 3 * 4096


def test_a_body_that_does_not_shrink_is_not_packed() -> None:
    pages = Pages()
    pages.source[:] = np.random.default_rng(2).integers(0, 256, pages.source.size, np.uint8)
    one = Encoder(pages.source, Replica(N_PAGES, 0), SEED)
    one.codec = Codec(Method.ZSTD, 3)
    out = np.empty(DEFAULT_FRAME_BYTES, np.uint8)
    done = one.encode(EVERYTHING[:1], 0, out, round_no=0, sequence=0)
    assert (done.n_bytes, out[CODING_OFFSET]) == (HEADER_BYTES + 4096 + 7, Coding.PLAIN)


def test_a_page_that_changed_much_is_a_delta_where_it_is_packed_afterwards() -> None:
    for codec, delta in ((LZ4, 0), (Codec(Method.ZSTD, 3), N_PAGES)):
        pages = Pages()
        pages.source[:] = np.random.default_rng(3).integers(0, 256, pages.source.size, np.uint8)
        pages.send(codec)
        pages.source.reshape(N_PAGES, -1)[:, :2500] += 1
        done, _ = pages.send(codec)
        assert done.delta == delta


def test_pages_sent_without_a_codec_are_no_bases_for_later() -> None:
    pages = Pages()
    pages.source[:] = np.random.default_rng(4).integers(0, 256, pages.source.size, np.uint8)
    for codec in (LZ4, NONE, LZ4):
        pages.source.reshape(N_PAGES, -1)[:, 0] += 1
        done, _ = pages.send(codec)
        assert done.raw == N_PAGES


@pytest.mark.parametrize("name", ["none", "delta", "lz4", "zstd:1", "auto"])
def test_lanes_use_the_codec_that_they_are_given(name: str, link_pair: Any) -> None:
    async def migrate() -> None:
        codec = None if name == "auto" else Codec.parse(name)
        async with link_pair(n_pages=4096, sending=SenderOptions(codec=codec)) as pair:
            for round_no in range(3):
                pair.source[:] = np.resize(words(round_no), pair.source.size)
                await pair.sender.send_round(np.arange(4096, dtype=np.uint32), round_no)
                assert np.array_equal(pair.source, pair.target)
            if codec is not None:
                assert set(pair.sender.statistics().codecs) == {name}

    trio.run(migrate)
