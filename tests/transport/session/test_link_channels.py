"""Records, tunnel, credit and liveness without a socket: two conversations, two queues between."""

from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.session import channels
from transport.session.channels import Conversation, RecordChannel, TunnelChannel
from transport.session.watch import WATCH_S
from transport.wire import records
from transport.wire.errors import RecordError
from transport.wire.records import (
    Attached,
    Ping,
    Pong,
    RecordCredit,
    RecordMessage,
    TunnelCredit,
    TunnelEof,
    TunnelHead,
)

NOW = 100.0


class Side:
    """One end: a conversation, what its application sends and what it got."""

    def __init__(self, pings: bool) -> None:
        self.talk = Conversation(now=NOW, peer_timeout_s=5.0, pings=pings, chunk_bytes=7)
        self.to_send: deque[tuple[int, bytes]] = deque()
        self.stream = b""
        self.got: list[tuple[int, bytes]] = []
        self.got_stream = b""
        self.got_eof = False
        self.control: deque[bytes] = deque()
        self.tunnel: deque[tuple[bytes, bytes | None]] = deque()

    def offer(self) -> None:
        while self.to_send and self.talk.records.try_queue(*self.to_send[0]):
            self.to_send.popleft()
        self.stream = self.stream[self.talk.tunnel.try_queue(memoryview(self.stream)) :]
        if not self.stream and not self.talk.tunnel.ended:
            self.talk.tunnel.end()

    def pack_control(self, limit: int) -> None:
        for _ in range(limit):
            if (message := self.talk.next_control(NOW)) is None:
                return
            self.control.append(message)

    def pack_tunnel(self, limit: int) -> None:
        if (credit := self.talk.tunnel.next_credit()) is not None:
            self.tunnel.append((credit, None))
        for _ in range(limit):
            if (message := self.talk.tunnel.next_message()) is None:
                return
            head, data = message
            self.tunnel.append((head, None if data is None else bytes(data)))

    def take(self, limit: int) -> None:
        for _ in range(limit):
            if (record := self.talk.records.take()) is not None:
                self.got.append((record.kind, record.payload))
            if chunk := self.talk.tunnel.take(5):
                self.got_stream += chunk
            self.got_eof = self.got_eof or chunk == b""


def deliver(source: Side, target: Side, limit: int) -> None:
    for _ in range(min(limit, len(source.control))):
        target.talk.on_control(records.unpack_control(source.control.popleft()), NOW)
    for _ in range(min(limit, len(source.tunnel))):
        head, data = source.tunnel.popleft()
        target.talk.on_tunnel(records.unpack_tunnel(head), data, NOW)


STEPS = st.lists(
    st.tuples(st.sampled_from(["offer", "control", "tunnel", "deliver", "take"]), st.booleans()),
    max_size=200,
)
STREAM = st.binary(max_size=90)
RECORDS = st.lists(st.tuples(st.integers(0, 65535), st.binary(max_size=20)), max_size=40)


@settings(max_examples=60)
@given(
    st.tuples(RECORDS, RECORDS), st.tuples(st.binary(max_size=90), st.binary(max_size=90)), STEPS
)
def test_any_interleaving_delivers_everything_in_order_within_the_window(
    sent: tuple[list[tuple[int, bytes]], ...], streams: tuple[bytes, ...], steps: list[Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Windows that are full all the time; the longest record must fit.
        patch.setattr(channels, "RECORD_WINDOW_BYTES", 2 * (channels.RECORD_COST_BYTES + 20))
        patch.setattr(channels, "TUNNEL_WINDOW_BYTES", 16)
        sides = (Side(pings=True), Side(pings=False))
        for side, mine, stream in zip(sides, sent, streams, strict=True):
            side.to_send, side.stream = deque(mine), stream
        fair = [(action, which) for action in ("offer", "control", "tunnel") for which in (0, 1)]
        fair += [("deliver", 0), ("deliver", 1), ("take", 0), ("take", 1)]
        for action, which in steps + fair * 120:
            side, other = sides[which], sides[not which]
            match action:
                case "offer":
                    side.offer()
                case "control":
                    side.pack_control(3)
                case "tunnel":
                    side.pack_tunnel(2)
                case "deliver":
                    deliver(side, other, 4)
                case "take":
                    side.take(1)
        for which in (0, 1):
            assert sides[which].got == sent[not which]
            assert sides[which].got_stream == streams[not which]
            assert sides[which].got_eof
            assert sides[which].talk.flushed


@given(st.lists(st.binary(max_size=64), min_size=1, max_size=30))
def test_i9_a_peer_that_ignores_the_record_window_is_caught(payloads: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "RECORD_WINDOW_BYTES", 1000)
        channel, cost = RecordChannel(), 0
        for number, payload in enumerate(payloads):
            cost += len(payload) + channels.RECORD_COST_BYTES
            if cost > 1000:
                with pytest.raises(RecordError, match="window"):
                    channel.on_record(RecordMessage(number, 1, payload))
                return
            channel.on_record(RecordMessage(number, 1, payload))


def test_i9_a_peer_that_ignores_the_tunnel_window_is_caught() -> None:
    channel, sent = TunnelChannel(), 0
    chunk = bytes(records.MAX_TUNNEL_CHUNK_BYTES)
    for _ in range(channels.TUNNEL_WINDOW_BYTES // len(chunk)):
        channel.on_data(TunnelHead(sent), chunk)
        sent += len(chunk)
    with pytest.raises(RecordError, match="window"):
        channel.on_data(TunnelHead(sent), b"1")


def test_i9_single_bytes_of_a_tunnel_do_not_cost_an_object_each() -> None:
    channel = TunnelChannel()
    for offset in range(3000):
        channel.on_data(TunnelHead(offset), b"x")
    assert len(channel._inbox) == 1
    assert channel.take(10_000) == b"x" * 3000


@pytest.mark.parametrize("sequence", [0, 2, 1 << 63])
def test_i9_records_that_are_replayed_or_skipped_are_caught(sequence: int) -> None:
    channel = RecordChannel()
    channel.on_record(RecordMessage(0, 1, b""))
    with pytest.raises(RecordError, match="instead of 1"):
        channel.on_record(RecordMessage(sequence, 1, b""))


@pytest.mark.parametrize(
    "credit", [(1, 0), (0, 1), (1 << 63, 0), (0, 1 << 63)], ids=["early", "taken", "far", "huge"]
)
def test_i9_credit_for_what_was_not_sent_is_caught(credit: tuple[int, int]) -> None:
    record_channel = RecordChannel()
    with pytest.raises(RecordError):
        record_channel.on_credit(RecordCredit(*credit))
    record_channel.try_queue(1, b"")  # queued, but not on the wire
    with pytest.raises(RecordError):
        record_channel.on_credit(RecordCredit(1, 10_000))
    tunnel = TunnelChannel()
    tunnel.try_queue(memoryview(b"1"))
    with pytest.raises(RecordError):
        tunnel.on_credit(TunnelCredit(*credit))


def test_i9_credit_that_shrinks_is_caught() -> None:
    channel = RecordChannel()
    for _ in range(2):
        channel.try_queue(1, b"")
    while channel.next_message() is not None:
        pass
    channel.on_credit(RecordCredit(2, 2 * channels.RECORD_COST_BYTES))
    for credit in ((1, 2 * channels.RECORD_COST_BYTES), (2, channels.RECORD_COST_BYTES)):
        with pytest.raises(RecordError):
            channel.on_credit(RecordCredit(*credit))


def test_i9_a_tunnel_that_goes_on_after_its_end_or_with_a_gap_is_caught() -> None:
    for bad in (TunnelHead(1), TunnelHead(0)):
        channel = TunnelChannel()
        channel.on_data(TunnelHead(0), b"12")
        with pytest.raises(RecordError):
            channel.on_data(bad, b"3")
    channel = TunnelChannel()
    channel.on_eof(TunnelEof(0))
    with pytest.raises(RecordError):
        channel.on_data(TunnelHead(0), b"1")
    with pytest.raises(RecordError):
        channel.on_eof(TunnelEof(0))


def test_i9_pings_that_are_not_read_do_not_pile_up() -> None:
    talk = Conversation(now=NOW, peer_timeout_s=5.0, pings=False)
    for stamp in range(1000):
        talk.on_control(Ping(stamp), NOW)
    answers = 0
    while talk.next_control(NOW) is not None:
        answers += 1
    assert 0 < answers <= 10


def test_i9_only_the_receiver_attaches_memory_and_only_once() -> None:
    with pytest.raises(RecordError):
        Conversation(now=NOW, peer_timeout_s=5.0, pings=False).on_control(Attached(1), NOW)
    sender = Conversation(now=NOW, peer_timeout_s=5.0, pings=True)
    sender.on_control(Attached(7), NOW)
    assert sender.peer_pages == 7
    with pytest.raises(RecordError):
        sender.on_control(Attached(7), NOW)


def test_a_silent_peer_is_lost_after_its_timeout_and_not_before() -> None:
    talk = Conversation(now=NOW, peer_timeout_s=5.0, pings=True)
    listen(talk, NOW, NOW + 3)
    talk.on_control(Pong(0), NOW + 3)
    listen(talk, NOW + 3, NOW + 8)
    assert talk.silent(NOW + 8.001)


def test_a_time_in_which_this_side_was_stopped_is_not_the_peers_silence() -> None:
    talk = Conversation(now=NOW, peer_timeout_s=5.0, pings=True)
    listen(talk, NOW, NOW + 1)
    assert not talk.silent(NOW + 101)
    listen(talk, NOW + 101, NOW + 105)
    assert talk.silent(NOW + 105.001)


def listen(talk: Conversation, begin: float, end: float) -> None:
    """As the threads do: no moment passes without a look at the peer's silence."""
    for now in np.arange(begin, end, WATCH_S):
        assert not talk.silent(float(now))
    assert not talk.silent(end)


@pytest.mark.parametrize(("mine", "theirs"), [(5.0, 1.0), (1.0, 5.0), (1000.0, 0.5), (5.0, 5.0)])
def test_pings_go_five_times_in_a_timeout_of_whichever_side_is_less_patient(
    mine: float, theirs: float
) -> None:
    talk = Conversation(now=NOW, peer_timeout_s=mine, pings=True)
    talk.next_control(NOW)
    talk.ping_for(theirs)
    pings = []
    for tick in range(1, 1000):
        message = talk.next_control(NOW + tick / 100)
        if message is not None and message[0] == records.MessageType.PING:
            pings.append(tick / 100)
    # The first one comes soon, since the peer counts from the greeting.
    assert pings[0] <= 0.11
    assert pings[1] - pings[0] == pytest.approx(min(mine, theirs) / 5, abs=0.02)
    assert len(pings) == pytest.approx(50 / min(mine, theirs), abs=2)


def test_a_pong_tells_the_round_trip() -> None:
    talk = Conversation(now=NOW, peer_timeout_s=5.0, pings=True)
    ping = talk.next_control(NOW)
    assert ping is not None
    talk.on_control(Pong(Ping.unpack(ping).value), NOW + 0.25)
    assert talk.round_trip_ns == pytest.approx(250_000_000, abs=1000)
