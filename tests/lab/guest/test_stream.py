"""The migration stream: what goes in comes out, and nothing else is believed."""

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from lab.guest.errors import GuestError, StreamError
from lab.guest.ram import Ram
from lab.guest.rounds import apply_record, dirty_chunks
from lab.guest.stream import Hello, Kind, StreamReader, StreamWriter

LOW = 2 << 20
HIGH = 1 << 20
N_PAGES = (LOW + HIGH) // 4096
GEOMETRY = {"low_bytes": LOW, "high_bytes": HIGH}


def read_all(data: bytes, step: int | None = None) -> list[Any]:
    reader = StreamReader()
    records = []
    for start in range(0, len(data), step or len(data)):
        reader.feed(data[start : start + (step or len(data))])
        while (record := reader.next_record()) is not None:
            records.append(record)
    return records


def sample() -> bytes:
    writer = StreamWriter()
    pages = np.array([3, 7, 9], np.uint32)
    data = np.zeros((3, 4096), np.uint8)
    data[1] = 5
    out = writer.hello(GEOMETRY)
    records, filled = writer.pages(pages, data)
    assert filled == 1
    return out + records + writer.state({"answer": 42}) + writer.end()


def test_byte_by_byte_is_the_same_as_whole() -> None:
    whole, pieces = read_all(sample()), read_all(sample(), 1)
    assert [type(record) for record in whole] == [type(record) for record in pieces]
    assert len(whole) == 5
    assert whole[0] == Hello(GEOMETRY)
    assert list(whole[1].pages) == [3, 9]
    assert list(whole[2].pages) == [7]
    assert whole[2].data.tobytes() == pieces[2].data.tobytes() == b"\5" * 4096
    assert whole[3].state == {"answer": 42}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_i9_no_damage_goes_unnoticed(data: st.DataObject) -> None:
    good = bytearray(sample())
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] ^= 1 << data.draw(st.integers(0, 7))
    reader = StreamReader()
    reader.feed(bytes(good))
    try:
        while reader.next_record() is not None:
            pass
    except StreamError:
        return
    # A length that has grown: the reader waits for bytes that do not come.
    assert not reader.ended


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_i9_garbage_is_refused_or_waited_for(data: bytes) -> None:
    with contextlib.suppress(StreamError):
        assert read_all(data or b"\0") == []


def record(number: int, kind: int, payload: bytes) -> bytes:
    """A record whose digest is right, whatever it says."""
    digest = xxh3_64_intdigest(payload, number << 8 | kind)
    return struct.pack("<IIQ", kind, len(payload), digest) + payload


HELLO = struct.pack("<8sI", b"FERRYVM\0", 1) + b"{}"


@pytest.mark.parametrize(
    "stream",
    [
        record(0, Kind.END, b""),
        record(0, Kind.STATE, b"{}"),
        record(0, Kind.HELLO, HELLO) + record(1, Kind.HELLO, HELLO),
        record(0, Kind.HELLO, HELLO) + record(1, Kind.END, b""),
        record(0, Kind.HELLO, HELLO) + record(1, Kind.STATE, b"{}") + record(2, Kind.STATE, b"{}"),
        record(0, Kind.HELLO, HELLO) + record(1, Kind.STATE, b"[]"),
        record(0, Kind.HELLO, HELLO) + record(1, Kind.STATE, b"[" * 100_000),
        record(0, Kind.HELLO, HELLO) + record(1, Kind.ZEROS, b"\1"),
        record(0, Kind.HELLO, HELLO) + record(1, Kind.ZEROS, bytes(4)),
        record(0, Kind.HELLO, HELLO) + record(1, Kind.PAGES, struct.pack("<II", 1, 0)),
        record(0, Kind.HELLO, HELLO) + struct.pack("<IIQ", Kind.PAGES, 1 << 31, 0),
        record(0, Kind.HELLO, HELLO) + record(2, Kind.STATE, b"{}"),
        record(0, Kind.HELLO, struct.pack("<8sI", b"FERRYVM\0", 2) + b"{}"),
        record(0, Kind.HELLO, b"FERRY"),
        record(0, 77, b""),
    ],
)
def test_i9_a_stream_out_of_order_or_shape_is_refused(stream: bytes) -> None:
    with pytest.raises(StreamError):
        read_all(stream)


def test_i9_a_page_outside_of_ram_is_refused() -> None:
    ram = Ram(LOW, HIGH)
    for kind, rest in ((Kind.ZEROS, b""), (Kind.PAGES, bytes(4096))):
        payload = struct.pack("<II", 1, N_PAGES) + rest
        for item in read_all(record(0, Kind.HELLO, HELLO) + record(1, kind, payload))[1:]:
            with pytest.raises(GuestError):
                apply_record(ram, {}, item)
    ram.close()


def test_a_guest_that_is_built_differently_is_refused() -> None:
    ram = Ram(LOW, HIGH)
    with pytest.raises(StreamError, match="high_bytes"):
        apply_record(ram, GEOMETRY, Hello({"low_bytes": LOW, "high_bytes": 7}))
    ram.close()


PAGE = st.integers(0, N_PAGES - 1)
ACT = st.tuples(st.sampled_from(["cpu", "device", "round"]), PAGE, st.integers(0, 255))


@settings(max_examples=60, deadline=None)
@given(st.lists(ACT, max_size=40))
def test_rounds_carry_what_the_cpu_wrote_and_are_blind_to_the_device(
    acts: list[tuple[str, int, int]],
) -> None:
    """The oracle is a dictionary of what was written by whom, and when the page was sent last."""
    source, target = Ram(LOW, HIGH), Ram(LOW, HIGH)
    writer, reader = StreamWriter(), StreamReader()

    def one_round() -> None:
        for chunk in dirty_chunks(source, writer):
            reader.feed(chunk.records)
        while (item := reader.next_record()) is not None:
            apply_record(target, GEOMETRY, item)

    now: dict[int, int] = {}
    sent: dict[int, int] = {}
    cpu_dirty: set[int] = set()
    reader.feed(writer.hello(GEOMETRY))
    source.mark_all()
    one_round()
    for who, page, value in [*acts, ("round", 0, 0)]:
        if who == "round":
            one_round()
            sent.update({number: now[number] for number in cpu_dirty})
            cpu_dirty.clear()
            continue
        address = page * 4096 if page * 4096 < LOW else (4 << 30) + page * 4096 - LOW
        now[page] = value
        if who == "cpu":
            source.write(address, bytes([value]) * 4096)
            cpu_dirty.add(page)
        else:
            # As a device does: through the memory, past the CPU's tracking.
            source.put_pages(np.array([page], np.uint32), np.full((1, 4096), value, np.uint8))
    for page, value in now.items():
        index = np.array([page], np.uint32)
        assert source.copy_pages(index).tobytes() == bytes([value]) * 4096
        assert target.copy_pages(index).tobytes() == bytes([sent.get(page, 0)]) * 4096
    source.close()
    target.close()


def test_i1_a_page_that_is_written_while_it_is_copied_is_sent_again() -> None:
    source = Ram(LOW, HIGH)
    source.write(0, b"old")
    copy_pages = source.copy_pages

    def copy_and_write(pages: Any) -> Any:
        copy = copy_pages(pages)
        source.write(0, b"new")
        return copy

    source.copy_pages = copy_and_write  # type: ignore[method-assign]
    list(dirty_chunks(source, StreamWriter()))
    assert list(source.dirty_indices()) == [0]
    source.close()
