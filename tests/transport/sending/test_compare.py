"""The sender's half of a comparison, without a network."""

from typing import cast

import numpy as np
import pytest

from transport.kernels.files import new_files
from transport.receiving.answers import answer_request
from transport.sending.compare import AHEAD, Chunk, CompareShare, DigestShare
from transport.sending.lanes import Task
from transport.sending.rounds import LaneSource, Source
from transport.wire.records import MAX_COMPARE_PAGES, unpack_request

PAGE = 4096
SEED = 0xF11E
N_PAGES = 4 * MAX_COMPARE_PAGES


@pytest.fixture(scope="module")
def lane() -> LaneSource:
    source = LaneSource(Source(np.zeros(N_PAGES * PAGE, np.uint8), SEED, 0, 1), 0, 1 << 20)
    source.prepare()
    return source


def shares(lane: LaneSource) -> list[Task]:
    chunks = [Chunk(0, start, MAX_COMPARE_PAGES) for start in range(0, N_PAGES, MAX_COMPARE_PAGES)]
    return [
        CompareShare(lane, np.arange(N_PAGES, dtype=np.uint32)),
        DigestShare(lane, chunks),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_the_receiver_is_asked_before_this_side_digests(which: int, lane: LaneSource) -> None:
    share = shares(lane)[which]
    buffer = np.empty(0, np.uint8)
    asked = [share.produce(buffer) is not None for _ in range(8)]
    assert asked == [True] * AHEAD + [False, True] * 2 + [False] * 2
    assert not share.ready
    assert not share.finished


@pytest.mark.parametrize("which", [0, 1])
def test_answers_may_come_before_this_side_has_digested(which: int, lane: LaneSource) -> None:
    share = shares(lane)[which]
    theirs = np.zeros(N_PAGES * PAGE, np.uint8)
    theirs[(MAX_COMPARE_PAGES + 7) * PAGE] = 1
    files = new_files((), N_PAGES)
    while not share.finished:
        outgoing = share.produce(np.empty(0, np.uint8))
        if outgoing is not None:
            request = unpack_request(memoryview(cast(bytes, outgoing.data)))
            share.on_answer(outgoing.context, answer_request(request, theirs, files, SEED))
    if isinstance(share, CompareShare):
        assert share.differing().tolist() == [MAX_COMPARE_PAGES + 7]
    elif isinstance(share, DigestShare):
        equal = [ours == others for ours, others in share.digests.values()]
        assert equal == [True, False, True, True]
