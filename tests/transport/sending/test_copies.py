"""A page that has another's bytes goes as that page's number: copies and their originals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.lane_pair import N_PAGES, SEED, LanePair, check_cache, pair, rewrite
from transport.kernels.digests import digest_all
from transport.sending.replica import Replica
from transport.wire.codec import DELTA, LZ4, NONE, Codec, Method
from transport.wire.frames import split_by_lane


def copying_pair(**arguments: int) -> tuple[LanePair, np.ndarray, np.ndarray]:
    """As `pair`; page 1 is sent, and page 5 has the same bytes."""
    lane, source, target = pair(**arguments)
    rewrite(source[1], "random", 1)
    source[5] = source[1]
    assert lane.send_one(1)[0] == "raw"
    return lane, source, target


@pytest.mark.parametrize("codec", [LZ4, Codec(Method.ZSTD, 1)])
def test_a_page_that_another_has_been_sent_as_is_its_number(codec: Codec) -> None:
    lane, source, target = copying_pair()
    lane.encoder.codec = codec
    ((done, frame),) = lane.frames(np.array([5], np.uint32))
    assert (done.copy, done.n_bytes) == (1, 40 + 4 + 8 + 7)
    assert lane.decoder.apply(frame).rejected.size == 0
    assert np.array_equal(source, target)
    check_cache(lane.encoder.replica)
    rewrite(source[5], "byte", 1)
    assert lane.send_one(5)[0] == "delta", "what was sent as a copy is a base as well"


@pytest.mark.parametrize("codec", [NONE, DELTA])
def test_what_is_not_compressed_is_not_looked_up_either(codec: Codec) -> None:
    lane, source, target = copying_pair()
    lane.encoder.codec = codec
    assert lane.send_one(5)[0] == "raw"
    assert np.array_equal(source, target)
    rewrite(source[6], "random", 2)
    source[7] = source[6]
    lane.send_one(6)
    lane.encoder.codec = LZ4
    assert lane.send_one(7)[0] == "raw"


@pytest.mark.parametrize("codec", [LZ4, Codec(Method.ZSTD, 1)])
def test_a_page_with_a_very_short_delta_is_neither_a_copy_nor_an_original(codec: Codec) -> None:
    lane, source, target = copying_pair()
    lane.encoder.codec = codec
    assert lane.send_one(5)[0] == "copy"
    source[1, 7] += 1
    source[9] = source[1]
    assert lane.send_one(1)[0] == "delta"
    assert lane.send_one(9)[0] == "raw"
    source[5] = source[9]
    assert lane.send_one(5)[0] == "delta"
    assert np.array_equal(source, target)


def test_a_copy_is_the_next_ones_original() -> None:
    lane, source, _ = copying_pair()
    source[9] = source[5]
    assert lane.send_one(5)[0] == "copy"
    rewrite(source[1], "random", 2)
    lane.send_one(1)
    assert lane.send_one(9)[0] == "copy"


@pytest.mark.parametrize("what", ["sent", "sent, and back", "written", "zero", "forgotten"])
def test_an_original_that_has_changed_is_none(what: str) -> None:
    """`sent, and back`: the page's memory is the same again, but the receiver does not know."""
    lane, source, target = copying_pair()
    if what == "forgotten":
        lane.encoder.forget(np.array([1], np.uint32))
    else:
        rewrite(source[1], "zero" if what == "zero" else "random", 2)
    if what.startswith("sent") or what == "zero":
        lane.send_one(1)
    if what == "sent, and back":
        source[1] = source[5]
    kind, applied = lane.send_one(5)
    assert kind == "raw"
    assert applied is not None
    assert applied.rejected.size == 0
    assert np.array_equal(source[5], target[5])


def test_pages_of_equal_digests_are_copies_only_if_their_bytes_are_equal() -> None:
    """XXH3 has 64 bits: what a guest of terabytes may meet is made up here."""
    lane, source, target = copying_pair()
    known = lane.encoder.replica.knowledge_of_lane(0)
    for last_byte in (0, 4095):
        source[5] = source[1]
        source[5, last_byte] ^= 1
        digest = digest_all(source[5], SEED)[0]
        known.digests[1] = digest
        known.originals[digest & np.uint64(known.originals.size - 1)] = 1 + 1
        known.digests[5] = 0
        assert lane.send_one(5)[0] == "raw"
        assert np.array_equal(source, target)


def test_i3_the_original_is_a_page_of_the_same_lane() -> None:
    source, target = np.ones((2, N_PAGES * 4096), np.uint8)
    rewrite(source[:4096], "random", 1)
    source.reshape(-1, 4096)[1:] = source[:4096]
    replica = Replica(N_PAGES, 0, lanes=2)
    lanes = [LanePair(source, target, replica, lane) for lane in (0, 1)]
    for lane, pages in zip(lanes, ([0, 1, 128], [64, 65, 192]), strict=True):
        assert [lane.send_one(page)[0] for page in pages] == ["raw", "copy", "copy"]


def test_the_table_of_originals_takes_at_most_four_bytes_a_page() -> None:
    for n_pages in (0, 1, 63, 64, 65, 127, 128, 1000, 4096):
        for lanes in (1, 2, 3, 200):
            entries = Replica(n_pages, 0, lanes).knowledge_of_lane(lanes - 1).originals.size
            assert entries.bit_count() == 1
            assert entries * lanes <= max(n_pages, lanes) < 2 * (entries + 1) * lanes


def test_i5_a_copy_that_was_rejected_is_sent_in_full() -> None:
    """Although there is a page with these bytes, of which it is not known yet that it was rejected,
    too."""
    lane, source, target = copying_pair()
    source[6] = source[5]
    target[1, 4095] ^= 1
    before = target.copy()
    for page in (5, 6):
        kind, applied = lane.send_one(page)
        assert kind == "copy"
        assert applied is not None
        assert applied.rejected.tolist() == [page]
    assert np.array_equal(target, before)
    for page in (5, 6):
        lane.encoder.forget(np.array([page], np.uint32))
        assert lane.send_one(page, full=True)[0] == "raw"
        assert np.array_equal(source[page], target[page])
    source[9] = source[5]
    assert lane.send_one(9)[0] == "copy", "what was sent in full is an original"
    assert np.array_equal(source[9], target[9])


few_pages = st.sampled_from([0, 1, 2, 63, 64, 65, 66, 130, 192, 193])
events = st.tuples(st.just("write"), few_pages, st.integers(0, 3)) | st.tuples(
    st.sampled_from(["touch", "send", "forget", "spoil"]), few_pages, st.integers(0, 4095)
)


@settings(max_examples=150, deadline=None)
@given(
    rounds=st.lists(st.lists(events, max_size=30), min_size=1, max_size=5),
    cache_pages=st.sampled_from([0, 2, N_PAGES]),
    lanes=st.integers(1, 3),
    codecs=st.lists(st.sampled_from(["delta", "lz4", "zstd:1"]), min_size=1, max_size=3),
)
def test_i5_pages_of_few_contents_arrive_whatever_happens_to_their_originals(
    rounds: list[list[tuple[str, int, int]]], cache_pages: int, lanes: int, codecs: list[str]
) -> None:
    """They are written while nobody sends them, forgotten, and spoiled at the receiver. What it
    rejects arrives at the second attempt, for good."""
    source, target = np.zeros((2, N_PAGES, 4096), np.uint8)
    contents = np.random.default_rng(1).integers(0, 256, (4, 4096), np.uint8)
    contents[0] = 0
    replica = Replica(N_PAGES, cache_pages * 4096, lanes)
    pairs = [
        LanePair(source.reshape(-1), target.reshape(-1), replica, lane) for lane in range(lanes)
    ]
    everything = np.arange(N_PAGES, dtype=np.uint32)
    spoiled = set()  # which the sender may take for equal
    for round_no, batch in enumerate(rounds):
        to_send = []
        for what, page, number in batch:
            if what == "write":
                source[page] = contents[number]
                to_send.append(page)
            elif what == "touch":
                source[page] = contents[number % 4]
            elif what == "spoil":
                target[page, number] ^= 1
                spoiled.add(page)
            elif what == "forget":
                replica.forget(np.array([page], np.uint32))
            else:
                to_send.append(page)
        parts = split_by_lane(np.array(to_send, np.uint32), lanes)
        for each, part in zip(pairs, parts, strict=True):
            each.encoder.codec = Codec.parse(codecs[round_no % len(codecs)])
            rejected = np.concatenate([part[:0], *(done.rejected for done in each.send(part))])
            # Some are sent again before it is known that others were rejected.
            for answered in np.array_split(rejected, 2):
                each.encoder.forget(answered)
                for _, frame in each.frames(answered, full=True):
                    assert each.decoder.apply(frame).rejected.size == 0
        for page in set(to_send) - spoiled:
            assert np.array_equal(source[page], target[page])
    replica.forget(everything)
    for each, part in zip(pairs, split_by_lane(everything, lanes), strict=True):
        for applied in each.send(part):
            assert applied.rejected.size == 0
    assert np.array_equal(source, target)
    check_cache(replica)
