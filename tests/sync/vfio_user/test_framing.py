"""The framer: whatever the chunks, the same messages, the same errors, the same descriptors."""

import itertools
import os
import socket
import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.framing import Framer, recv_into_framer, send_message
from sync.vfio_user.protocol import Header

LIMIT = 300

good_messages = st.builds(
    lambda ident, command, body, flags: (
        struct.pack("<HHIII", ident, command, 16 + len(body), flags, 0) + body
    ),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.binary(max_size=LIMIT - 16),
    st.sampled_from([0, 1, 0x10]),
)
streams = st.lists(good_messages | st.binary(max_size=40), max_size=6).map(b"".join)


def drain(framer: Framer) -> tuple[list[tuple[Header, bytes]], str | None]:
    messages = []
    try:
        while (message := framer.next_message()) is not None:
            messages.append((message.header, message.body))
    except ProtocolError as error:
        return messages, str(error)
    return messages, None


def feed_cut(framer: Framer, stream: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(edges):
        framer.feed(stream[start:end])


@given(streams, st.lists(st.integers(0, 4000), max_size=8))
def test_chunks_do_not_matter(stream: bytes, cuts: list[int]) -> None:
    """Whole, byte by byte and cut anywhere give the same messages and the same error."""
    whole, single, cut = Framer(LIMIT), Framer(LIMIT), Framer(LIMIT)
    whole.feed(stream)
    for position in range(len(stream)):
        single.feed(stream[position : position + 1])
    feed_cut(cut, stream, cuts)
    expected = drain(whole)
    assert drain(single) == expected
    assert drain(cut) == expected


@given(st.lists(good_messages, max_size=6))
def test_messages_come_out_as_they_went_in(messages: list[bytes]) -> None:
    framer = Framer(LIMIT)
    framer.feed(b"".join(messages))
    found, error = drain(framer)
    assert error is None
    assert [struct.pack("<HHIII", *header) + body for header, body in found] == messages
    assert not framer.mid_message


@given(
    st.lists(st.tuples(good_messages, st.integers(0, 2)), min_size=1, max_size=6),
    st.lists(st.integers(0, 4000), max_size=8),
)
@settings(max_examples=60)
def test_descriptors_go_to_the_message_that_brought_them(
    sent: list[tuple[bytes, int]], cuts: list[int]
) -> None:
    """A read ends behind the buffer with descriptors, so a message with some ends or is cut there,
    but it may start anywhere in its chunk."""
    framer = Framer(LIMIT, max_fds=2)
    expected = []
    position = 0
    waiting = b""
    for message, count in sent:
        fds = [os.dup(0) for _ in range(count)]
        expected.append(fds.copy())
        if not count:
            waiting += message
            continue
        cut = 1 + cuts[position % len(cuts)] % len(message) if cuts else len(message)
        position += 1
        framer.feed(waiting + message[:cut], fds)
        waiting = message[cut:]
    framer.feed(waiting)
    found = []
    while (taken := framer.next_message()) is not None:
        found.append(taken.fds)
        for fd in taken.fds:
            os.close(fd)
    assert found == expected


def test_too_many_descriptors_end_the_stream_and_are_closed(open_fds: Callable[[], int]) -> None:
    before = open_fds()
    for cut in (5, 16, 20):
        framer = Framer(LIMIT, max_fds=1)
        message = struct.pack("<HHIII", 1, 2, 20, 0, 0) + bytes(4)
        framer.feed(message)
        framer.feed(message[:cut], [os.dup(0), os.dup(0)])
        framer.feed(message[cut:])
        assert framer.next_message() is not None
        with pytest.raises(ProtocolError):
            framer.next_message()
        framer.feed(b"more", [os.dup(0)])
        framer.close()
    assert open_fds() == before


def test_closing_closes_what_no_one_took(open_fds: Callable[[], int]) -> None:
    before = open_fds()
    framer = Framer(LIMIT, max_fds=1)
    message = struct.pack("<HHIII", 1, 2, 20, 0, 0) + bytes(4)
    framer.feed(message, [os.dup(0)])
    framer.feed(message[:18], [os.dup(0)])
    framer.close()
    framer.close()
    assert open_fds() == before


@pytest.mark.parametrize(
    ("size", "flags"), [(0, 0), (15, 0), (LIMIT + 1, 0), (2**32 - 1, 0), (16, 2), (20, 0x21)]
)
def test_headers_that_are_none(size: int, flags: int) -> None:
    framer = Framer(LIMIT)
    framer.feed(struct.pack("<HHIII", 1, 1, size, flags, 0))
    for _ in range(2):
        with pytest.raises(ProtocolError):
            framer.next_message()


def test_i9_memory_grows_with_what_arrived_not_with_what_is_announced() -> None:
    framer = Framer(1 << 30)
    tracemalloc.start()
    try:
        framer.feed(struct.pack("<HHIII", 1, 1, 1 << 30, 0, 0) + bytes(100))
        assert framer.next_message() is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 65536


def test_over_a_socket_with_descriptors(open_fds: Callable[[], int]) -> None:
    before = open_fds()
    left, right = socket.socketpair()
    framer = Framer(1 << 20, max_fds=4)
    plain = struct.pack("<HHIII", 1, 9, 16, 0, 0)
    bearing = struct.pack("<HHIII", 2, 8, 20, 0, 0) + bytes(4)
    with left, right:
        for data, fds in [(plain, ()), (bearing, (0, 1)), (plain, ()), (bearing, (2,))]:
            assert send_message(left, data, fds) == len(data)
        left.close()
        while recv_into_framer(right, framer):
            pass
    counts = []
    while (message := framer.next_message()) is not None:
        counts.append(len(message.fds))
        for fd in message.fds:
            assert not os.get_inheritable(fd)
            os.close(fd)
    assert counts == [0, 2, 0, 1]
    assert open_fds() == before


def test_more_descriptors_than_a_message_may_have(open_fds: Callable[[], int]) -> None:
    before = open_fds()
    left, right = socket.socketpair()
    framer = Framer(1 << 20, max_fds=1)
    with left, right:
        send_message(left, struct.pack("<HHIII", 2, 8, 20, 0, 0), (0, 0, 0, 0, 0))
        recv_into_framer(right, framer)
    with pytest.raises(ProtocolError):
        framer.next_message()
    framer.close()
    assert open_fds() == before


def test_an_end_inside_a_message_is_an_error() -> None:
    left, right = socket.socketpair()
    framer = Framer(1 << 20)
    with left, right:
        left.send(bytes(7))
        left.close()
        assert recv_into_framer(right, framer)
        assert not recv_into_framer(right, framer)
    with pytest.raises(ProtocolError):
        framer.next_message()


def test_a_non_blocking_socket_takes_what_it_can() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        data = struct.pack("<HHIII", 1, 9, 8 << 20, 0, 0).ljust(8 << 20, b"x")
        sent = send_message(left, data)
        assert 0 < sent < len(data)
        assert send_message(left, data[sent:]) == 0
        right.setblocking(False)
        framer = Framer(8 << 20)
        while sent < len(data):
            recv_into_framer(right, framer)
            sent += send_message(left, data[sent:])
        while framer.mid_message:
            recv_into_framer(right, framer)
        message = framer.next_message()
        assert message is not None
        assert message.body == data[16:]
