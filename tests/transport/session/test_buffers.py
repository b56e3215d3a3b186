"""Messages whose memory goes to libzmq: what arrives, and that each is freed exactly once."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tests.transport.running import run_trio
from transport.kernels.clib import NativeLibraryError
from transport.session import buffers
from transport.session.buffers import MessageBuffer

WAIT_MS = 10_000


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Addresses that were allocated and have not been freed since, by us or by libzmq."""
    functions = buffers._functions()
    held: list[int] = []

    def allocate(n_bytes: int) -> Any:
        address = functions.allocate(n_bytes)
        held.append(address)
        return address

    def free(address: int, _hint: Any = None) -> None:
        held.remove(address)
        functions.free(address)

    release = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(free)
    counted = functions._replace(
        allocate=allocate, free=free, release=ctypes.cast(release, ctypes.c_void_p).value
    )
    monkeypatch.setattr(buffers, "_functions", lambda: counted)
    yield held


def pair(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[Any, Any]:
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    port = left.bind_to_random_port("tcp://127.0.0.1")
    right.connect(f"tcp://127.0.0.1:{port}")
    right.set(zmq.RCVTIMEO, WAIT_MS)
    left.poll(WAIT_MS, zmq.POLLOUT)
    return left, right


@given(st.lists(st.tuples(st.integers(1, 300_000), st.integers(0, 255)), max_size=12))
def test_what_arrives_is_what_stood_there_when_it_was_sent(sizes: list[tuple[int, int]]) -> None:
    with zmq.Context() as context:
        left, right = pair(context)
        with left, right:
            for n_bytes, fill in sizes:
                buffer = MessageBuffer(300_000)
                buffer.array[:n_bytes] = fill
                buffer.send(left, n_bytes)
                assert buffer.array.size == 0
            for n_bytes, fill in sizes:
                assert right.recv() == bytes([fill]) * n_bytes


def test_memory_is_freed_once_it_was_sent(
    context: zmq.Context[zmq.Socket[bytes]], books: list[int]
) -> None:
    left, right = pair(context)
    with left, right:
        for _ in range(50):
            buffer = MessageBuffer(1 << 20)
            assert buffer.array.ctypes.data % 8 == 0
            buffer.send(left, 1 << 20)
            right.recv()
    context.term()
    assert books == []


def test_memory_is_freed_if_it_is_never_sent(
    context: zmq.Context[zmq.Socket[bytes]], books: list[int]
) -> None:
    unused = MessageBuffer(4096)
    assert len(books) == 1
    unused.free()
    assert books == []
    with context.socket(zmq.DEALER) as nobody:
        buffer = MessageBuffer(4096)
        with pytest.raises(zmq.ZMQError) as caught:
            buffer.send(nobody, 4096)
        assert caught.value.errno == zmq.EAGAIN
        assert books == [] and buffer.array.size == 0
    with context.socket(zmq.DEALER) as waiting:
        waiting.set(zmq.LINGER, 0)
        waiting.connect("tcp://127.0.0.1:1")
        MessageBuffer(4096).send(waiting, 4096)
        assert len(books) == 1
    context.term()
    assert books == []


def test_no_memory_and_no_libzmq_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError, match="9223372036854775807 bytes"):
        MessageBuffer((1 << 63) - 1)
    buffers._functions.cache_clear()
    monkeypatch.setattr(buffers, "_PYZMQ", "zmq.backend.of_another_kind")
    with pytest.raises(NativeLibraryError, match=r"of_another_kind cannot be loaded.*pyzmq>=26"):
        MessageBuffer(4096)


def test_a_sender_without_libzmq_says_so_before_its_first_round(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers._functions.cache_clear()
    monkeypatch.setattr(buffers, "_PYZMQ", "zmq.backend.of_another_kind")

    async def scenario() -> None:
        async with link_pair(n_pages=10) as pair:
            await pair.sender.receive_record()

    with pytest.raises(ExceptionGroup) as caught:
        run_trio(scenario)
    assert caught.group_contains(NativeLibraryError, match="of_another_kind")
