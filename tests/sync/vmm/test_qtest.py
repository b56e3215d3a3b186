"""qtest's lines: what is sent, what is taken for an answer, and that nothing else is."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from sync.vmm.errors import VmmGone
from sync.vmm.qtest import (
    MAX_ACCESS_BYTES,
    Qtest,
    QtestCore,
    QtestError,
    memory_read,
    memory_write,
    port_read,
    port_write,
)


def test_commands_as_qemu_takes_them() -> None:
    assert port_read(0xCF8, 4) == "inl 0xcf8"
    assert port_write(0xCFE, 2, 0x107) == "outw 0xcfe 0x107"
    assert port_write(0xCFC, 1, 10) == "outb 0xcfc 0xa"
    assert memory_read(0xFE800000, 48) == "read 0xfe800000 0x30"
    assert memory_write(0x1000, b"\x01\xff") == "write 0x1000 0x2 0x01ff"


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (port_write, (0xCF8, 1, 256)),
        (port_write, (1 << 16, 4, 0)),
        (port_read, (-1, 4)),
        (memory_read, (0, 0)),
        (memory_read, (0, MAX_ACCESS_BYTES + 1)),
        (memory_read, ((1 << 64) - 1, 2)),
        (memory_write, (0, b"")),
    ],
)
def test_what_would_abort_qemu_is_never_sent(
    make: Callable[..., Any], arguments: tuple[bytes | int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"bits|cannot be accessed"):
        make(*arguments)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.data())
def test_replies_arrive_in_any_pieces(values: list[bytes], data: st.DataObject) -> None:
    core = QtestCore()
    assert core.send([memory_read(0, 1)] * len(values)).count(b"\n") == len(values)
    stream = b"".join(b"OK 0x%s\n" % value.hex().encode() for value in values)
    replies = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        core.feed(stream[:size])
        stream = stream[size:]
        while (reply := core.next_reply()) is not None:
            replies.append(reply)
    assert replies == values


def test_a_value_may_have_an_odd_number_of_digits() -> None:
    core = QtestCore()
    core.send(["inl 0xcf8", "outl 0xcf8 0x0"])
    core.feed(b"OK 0x80004\nOK\n")
    assert [core.next_reply(), core.next_reply()] == [b"\x08\x00\x04", b""]


@pytest.mark.parametrize(
    "answer", [b"FAIL Unknown command\n", b"OK zz\n", b"OK 0x1 0x2\n", b"\n", b"IRQ raise 1\n"]
)
def test_a_refusal_or_nonsense_is_an_error(answer: bytes) -> None:
    core = QtestCore()
    core.send(["inl 0xcf8"])
    core.feed(answer)
    with pytest.raises(QtestError):
        core.next_reply()


def test_an_answer_to_nothing_is_an_error() -> None:
    core = QtestCore()
    core.feed(b"OK\n")
    with pytest.raises(QtestError, match="not asked"):
        core.next_reply()


def test_i9_a_line_without_an_end_is_refused() -> None:
    core = QtestCore()
    core.send(["inl 0xcf8"])
    with pytest.raises(QtestError, match="without an end"):
        for _ in range(100):
            core.feed(b"0" * 4096)
            core.next_reply()


@given(st.binary(max_size=80))
def test_any_bytes_end_in_replies_or_in_the_typed_error(data: bytes) -> None:
    core = QtestCore()
    core.send(["inl 0xcf8"] * 100)
    core.feed(data)
    try:
        while core.next_reply() is not None:
            pass
    except QtestError:
        pass


def test_a_qemu_that_goes_away_is_gone() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        async with Qtest(trio.SocketStream(trio.socket.from_stdlib_socket(ours))) as qtest:
            with pytest.raises(VmmGone):
                await qtest.run(["inl 0xcf8"])

    trio.run(main)
