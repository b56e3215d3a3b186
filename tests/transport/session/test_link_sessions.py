"""Records, tunnel and the end of a session, over real sockets."""

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from tests.transport import running
from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.sender import SenderOptions, open_sender
from transport.session.channels import RECORD_WINDOW_BYTES, TUNNEL_WINDOW_BYTES, Record
from transport.session.link import Closing
from transport.wire.errors import LinkFailed, PeerClosed, PeerLost
from transport.wire.records import MAX_RECORD_BYTES

DEADLINE_S = 10
run_trio = partial(running.run_trio, deadline_s=DEADLINE_S)


def ferry_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("ferry-")}


def test_records_arrive_in_order_in_both_directions(bind_url: str, link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(bind_url) as pair:
            lengths = [0, 1, 255, 256, 65536, MAX_RECORD_BYTES] * 5
            sent = [Record(n, os.urandom(length)) for n, length in enumerate(lengths)]

            async def send(link: Any) -> None:
                for record in sent:
                    await link.send_record(record.kind, record.payload)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, pair.sender)
                nursery.start_soon(send, pair.receiver)
                for record in sent:
                    assert await pair.receiver.receive_record() == record
                    assert await pair.sender.receive_record() == record

    run_trio(scenario)


def test_a_flushed_record_has_arrived(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            await pair.sender.send_record(7, b"commit", flush=True)
            assert pair.receiver._shared.talk.records.received == 1

    run_trio(scenario)


def test_a_slow_application_stops_its_peer(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            sent = 0
            with trio.move_on_after(0.5):
                while True:
                    await pair.sender.send_record(1, bytes(1 << 20))
                    sent += 1
            assert 1 <= sent <= RECORD_WINDOW_BYTES >> 20
            await pair.receiver.receive_record()
            await pair.receiver.receive_record()
            await pair.sender.send_record(2, bytes(1 << 20))

            sent = 0
            with trio.move_on_after(0.5):
                while True:
                    await pair.sender.tunnel_send(bytes(100_000))
                    sent += 100_000
            assert sent <= TUNNEL_WINDOW_BYTES
            assert pair.sender.statistics().tunnel_bytes_sent == TUNNEL_WINDOW_BYTES

    run_trio(scenario)


@pytest.mark.parametrize(("kind", "length"), [(-1, 0), (65536, 0), (1, MAX_RECORD_BYTES + 1)])
def test_a_record_beyond_the_limits_is_refused(kind: int, length: int, link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            with pytest.raises(ValueError, match="record"):
                await pair.sender.send_record(kind, bytes(length))

    run_trio(scenario)


def test_the_tunnel_carries_both_directions_and_each_ends_by_itself(
    bind_url: str, link_pair: Any
) -> None:
    async def scenario() -> None:
        async with link_pair(bind_url) as pair:
            there, back = os.urandom(9_000_001), os.urandom(5_000_003)

            async def send(link: Any, data: bytes, piece: int) -> None:
                for start in range(0, len(data), piece):
                    await link.tunnel_send(bytearray(data[start : start + piece]))
                await link.tunnel_send_eof()

            async def receive(link: Any) -> bytes:
                data = bytearray()
                while chunk := await link.tunnel_receive(300_000):
                    assert len(chunk) <= 300_000
                    data += chunk
                assert await link.tunnel_receive() == b""
                return bytes(data)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, pair.sender, there, 1_000_000)
                assert await receive(pair.receiver) == there
                nursery.start_soon(send, pair.receiver, back, 10_000)
                assert await receive(pair.sender) == back
            with pytest.raises(ValueError, match="closed"):
                await pair.sender.tunnel_send(b"more")

    run_trio(scenario)


def test_a_cancelled_wait_takes_nothing_away(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            for wait in (pair.receiver.receive_record, pair.receiver.tunnel_receive):
                with trio.move_on_after(0.01) as scope:
                    await wait()
                assert scope.cancelled_caught
            await pair.sender.send_record(5, b"still there")
            await pair.sender.tunnel_send(b"still there")
            assert await pair.receiver.receive_record() == Record(5, b"still there")
            assert await pair.receiver.tunnel_receive() == b"still there"

    run_trio(scenario)


def test_what_was_sent_before_leaving_arrives_before_the_farewell(bind_url: str) -> None:
    async def scenario() -> None:
        async with open_receiver(bind_url) as receiver, trio.open_nursery() as nursery:

            async def send() -> None:
                async with open_sender(receiver.url, os.urandom(16), b"") as sender:
                    for number in range(40):
                        await sender.send_record(number, bytes(50_000))
                    await sender.tunnel_send(bytes(1_000_000))

            nursery.start_soon(send)
            await receiver.wait_hello()
            await receiver.accept(b"")
            await _expect_all(receiver, 40, 1_000_000)

    run_trio(scenario)


async def _expect_all(receiver: Receiver, records: int, tunnel_bytes: int) -> None:
    await trio.sleep(0.1)  # the farewell shall be here before we look
    for number in range(records):
        assert (await receiver.receive_record()).kind == number
    with pytest.raises(PeerClosed):
        await receiver.receive_record()
    while tunnel_bytes:
        tunnel_bytes -= len(await receiver.tunnel_receive())
    with pytest.raises(PeerClosed):
        await receiver.tunnel_receive()


def test_the_receivers_last_word_arrives_before_its_farewell(bind_url: str) -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:

            async def receive(task_status: trio.TaskStatus[str]) -> None:
                async with open_receiver(bind_url) as receiver:
                    task_status.started(receiver.url)
                    await receiver.wait_hello()
                    await receiver.accept(b"")
                    await receiver.send_record(1, b"committed")

            url = await nursery.start(receive)
            async with open_sender(url, os.urandom(16), b"") as sender:
                assert await sender.receive_record() == Record(1, b"committed")
                with pytest.raises(PeerClosed):
                    await sender.receive_record()

    run_trio(scenario)


def test_leaving_by_an_error_does_not_wait_for_the_peer(link_pair: Any) -> None:
    async def scenario() -> None:
        with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
            async with link_pair(sending=SenderOptions(linger_s=100)) as pair:
                for _ in range(3):
                    await pair.sender.send_record(1, bytes(1 << 20))
                raise ZeroDivisionError

    run_trio(scenario)
    assert not ferry_threads()


def test_cancelled_at_any_point_no_thread_stays() -> None:
    async def scenario() -> None:
        for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05):
            with trio.move_on_after(delay):
                async with (
                    open_receiver("tcp://127.0.0.1:*") as receiver,
                    trio.open_nursery() as nursery,
                ):
                    nursery.start_soon(_welcome, receiver)
                    async with open_sender(receiver.url, os.urandom(16), b"") as sender:
                        await sender.receive_record()
            assert not ferry_threads()

    run_trio(scenario)


async def _welcome(receiver: Receiver) -> None:
    await receiver.wait_hello()
    await receiver.accept(b"")


def test_a_session_leaves_no_thread_and_no_descriptor(
    bind_url: str, link_pair: Any, open_fds: Callable[[], int]
) -> None:
    async def scenario() -> None:
        async with link_pair(bind_url, n_pages=100) as pair:
            await pair.sender.send_round(np.arange(100, dtype=np.uint32), 1)
        assert not ferry_threads()

    run_trio(scenario)  # what the first session loads for good does not count
    before = open_fds()
    run_trio(scenario)
    deadline = time.monotonic() + DEADLINE_S
    while (left := open_fds()) > before:
        # libzmq closes its sockets in a thread of its own.
        assert time.monotonic() < deadline, (left, before)
        time.sleep(0.01)


def test_ipv6_is_spoken_where_the_url_says_so(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair("tcp://[::1]:*") as pair:
            await pair.sender.send_record(1, b"six", flush=True)

    run_trio(scenario)


def test_a_closed_link_says_so() -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            pass
        with pytest.raises(trio.ClosedResourceError):
            await receiver.receive_record()
        with pytest.raises(trio.ClosedResourceError):
            await receiver.wait_hello()

    run_trio(scenario)


def test_a_receiver_that_vanishes_is_lost_at_once(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(sending=SenderOptions(peer_timeout_s=1000)) as pair:
            pair.receiver._shared.start_closing(Closing.DROP)
            with pytest.raises(PeerLost, match="connection"):
                await pair.sender.receive_record()
            with pytest.raises(PeerLost):
                await pair.sender.send_record(1, b"")

    run_trio(scenario)


def test_a_sender_that_vanishes_is_lost_at_once(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(
            sending=SenderOptions(peer_timeout_s=1000),
            receiving=ReceiverOptions(peer_timeout_s=1000),
        ) as pair:
            pair.sender._shared.start_closing(Closing.DROP)
            with pytest.raises(PeerLost, match="connection"):
                await pair.receiver.receive_record()

    run_trio(scenario)


def test_a_thread_that_fails_surfaces_as_a_typed_error(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:

            def broken(*_: object) -> None:
                raise ZeroDivisionError("a bug")

            monkeypatch.setattr(pair.receiver._router, "_on_control", broken)
            with pytest.raises(LinkFailed, match="a bug") as failed:
                await pair.receiver.receive_record()
            assert isinstance(failed.value.__cause__, ZeroDivisionError)
            with pytest.raises(PeerLost):
                await pair.sender.receive_record()

    run_trio(scenario)
    assert not ferry_threads()


def test_both_sides_outlive_their_timeouts_while_they_ping(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair(
            sending=SenderOptions(peer_timeout_s=1000),
            receiving=ReceiverOptions(peer_timeout_s=1.5),
        ) as pair:
            await trio.sleep(3.2)
            await pair.sender.send_record(1, b"", flush=True)
            assert pair.sender.statistics().round_trip_ns > 0

    run_trio(scenario)


def test_who_is_cancelled_as_the_link_closes_is_cancelled_and_fails_not(link_pair: Any) -> None:
    """Even if it was just woken for another reason, so that it looks once more before it hears of
    the cancellation."""

    async def scenario() -> None:
        async with link_pair() as pair:
            shared = pair.sender._shared
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pair.sender.receive_record)
                    await trio.testing.wait_all_tasks_blocked()
                    shared.changed._fire()
                    scope.cancel()
                    shared.start_closing(Closing.DRAIN)
            assert scope.cancelled_caught
            with pytest.raises(trio.ClosedResourceError):
                await pair.sender.receive_record()

    run_trio(scenario)
