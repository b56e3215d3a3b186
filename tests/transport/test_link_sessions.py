"""Greeting, records, tunnel and the end of a session, over real sockets."""

import os
import socket
import stat
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from transport.channels import RECORD_WINDOW_BYTES, TUNNEL_WINDOW_BYTES, Record
from transport.errors import (
    EndpointError,
    LinkFailed,
    PeerClosed,
    PeerLost,
    PeerRefused,
    PeerUnreachable,
    VersionMismatch,
)
from transport.link import Closing
from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.records import MAX_RECORD_BYTES
from transport.sender import SenderOptions, open_sender

_DROP = Closing.DROP
DEADLINE_S = 10


def run_trio(function: Callable[[], Awaitable[None]]) -> None:
    """Run with a deadline: a test that hangs fails."""

    async def bounded() -> None:
        with trio.fail_after(DEADLINE_S):
            await function()

    trio.run(bounded)


def ferry_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("ferry-")}


def test_both_sides_hear_the_greeting(bind_url: str) -> None:
    async def scenario() -> None:
        async with open_receiver(bind_url) as receiver, trio.open_nursery() as nursery:
            session = os.urandom(16)

            async def answer() -> None:
                greeting = await receiver.wait_hello()
                assert (greeting.session, greeting.payload) == (session, b"who I am")
                assert (greeting.lanes, greeting.frame_bytes) == (3, 65536)
                await receiver.accept(b"come in")

            nursery.start_soon(answer)
            options = SenderOptions(lanes=3, frame_bytes=65536)
            async with open_sender(receiver.url, session, b"who I am", options) as sender:
                assert sender.hello_reply == b"come in"
                assert sender.seed == receiver.seed

    run_trio(scenario)
    assert not ferry_threads()


def test_an_ipc_endpoint_is_for_its_owner_only(socket_folder: Path) -> None:
    async def scenario() -> None:
        path = socket_folder / "link"
        before = os.umask(0)
        try:
            async with open_receiver(f"ipc://{path}"):
                mode = path.stat().st_mode
                assert stat.S_ISSOCK(mode)
                assert stat.S_IMODE(mode) == 0o600
                assert os.umask(0) == 0
        finally:
            os.umask(before)
        assert not path.exists()

    run_trio(scenario)


def test_a_receiver_takes_the_place_of_a_dead_socket_but_of_nothing_else(
    socket_folder: Path,
) -> None:
    dead, file, live = (socket_folder / name for name in ("dead", "file", "live"))
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(dead))
    file.write_text("precious")

    async def scenario() -> None:
        async with open_receiver(f"ipc://{dead}"):
            pass
        with pytest.raises(EndpointError, match="no socket"):
            async with open_receiver(f"ipc://{file}"):
                pass
        async with open_receiver(f"ipc://{live}"):
            with pytest.raises(EndpointError, match="another process"):
                async with open_receiver(f"ipc://{live}"):
                    pass
            assert live.exists()

    run_trio(scenario)
    assert file.read_text() == "precious"
    assert not ferry_threads()


@pytest.mark.parametrize(
    "url",
    [
        "tcp://127.0.0.1",
        "tcp://:5000",
        "tcp://127.0.0.1:70000",
        "tcp://127.0.0.1:0",
        "udp://127.0.0.1:1",
        "127.0.0.1:1",
        "ipc://relative",
        "ipc://@abstract",
        "inproc://x",
        "tcp://[::1:5",
        "",
    ],
)
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    async def scenario() -> None:
        with pytest.raises(EndpointError):
            async with open_sender(url, bytes(16), b""):
                pass

    run_trio(scenario)


def test_a_taken_port_is_refused() -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            with pytest.raises(EndpointError, match="cannot bind"):
                async with open_receiver(receiver.url):
                    pass

    run_trio(scenario)


def test_nobody_there_is_unreachable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def scenario() -> None:
        with pytest.raises(PeerUnreachable, match="is the receiver running"):
            async with open_sender(
                f"tcp://127.0.0.1:{port}", bytes(16), b"", SenderOptions(connect_timeout_s=0.3)
            ):
                pass

    run_trio(scenario)
    assert not ferry_threads()


def test_somebody_who_does_not_speak_our_protocol_is_unreachable() -> None:
    async def scenario() -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            with pytest.raises(PeerUnreachable):
                async with open_sender(
                    f"tcp://127.0.0.1:{mute.getsockname()[1]}",
                    bytes(16),
                    b"",
                    SenderOptions(connect_timeout_s=0.3),
                ):
                    pass

    run_trio(scenario)


def test_a_receiver_that_comes_late_is_found(socket_folder: Path) -> None:
    url = f"ipc://{socket_folder}/late"

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            opened = trio.Event()

            async def send() -> None:
                async with open_sender(url, bytes(16), b"patient") as sender:
                    assert sender.hello_reply == b"at last"
                    opened.set()

            nursery.start_soon(send)
            for _ in range(20):  # let the sender fail to connect at least once
                await trio.sleep(0.01)
            async with open_receiver(url) as receiver:
                await receiver.wait_hello()
                await receiver.accept(b"at last")
                await opened.wait()
                with pytest.raises(PeerClosed):
                    await receiver.receive_record()

    run_trio(scenario)


def test_a_refusal_reaches_the_sender_and_the_next_one_may_come(bind_url: str) -> None:
    async def scenario() -> None:
        async with open_receiver(bind_url) as receiver, trio.open_nursery() as nursery:

            async def answer() -> None:
                await receiver.wait_hello()
                await receiver.refuse(b"other device")
                assert (await receiver.wait_hello()).payload == b"second"
                await receiver.accept(b"yes")

            nursery.start_soon(answer)
            with pytest.raises(PeerRefused) as refused:
                async with open_sender(receiver.url, os.urandom(16), b"first"):
                    pass
            assert refused.value.payload == b"other device"
            async with open_sender(receiver.url, os.urandom(16), b"second") as sender:
                assert sender.hello_reply == b"yes"

    run_trio(scenario)


def test_a_refusal_is_delivered_though_the_receiver_leaves() -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:

            async def refuse(task_status: trio.TaskStatus[str]) -> None:
                async with open_receiver("tcp://127.0.0.1:*") as receiver:
                    task_status.started(receiver.url)
                    await receiver.wait_hello()
                    await receiver.refuse(bytes(MAX_RECORD_BYTES))

            url = await nursery.start(refuse)
            with pytest.raises(PeerRefused) as refused:
                async with open_sender(url, os.urandom(16), b""):
                    pass
            assert len(refused.value.payload) == MAX_RECORD_BYTES

    run_trio(scenario)


def test_a_second_sender_finds_the_receiver_busy(link_pair: Any) -> None:
    async def scenario() -> None:
        async with link_pair() as pair:
            with pytest.raises(PeerUnreachable, match="busy"):
                async with open_sender(pair.receiver.url, os.urandom(16), b""):
                    pass
            await pair.sender.send_record(1, b"unharmed", flush=True)
            assert pair.receiver.statistics().dropped_messages >= 1

    run_trio(scenario)


def test_another_version_is_named_on_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            packed = struct.pack("<B8sHBBII", 2, b"vfioferr", 9, 3, 1, 5000, 0)
            monkeypatch.setattr("transport.records.HelloReply.pack", lambda self: packed)
            monkeypatch.setattr("transport.records.Hello.unpack", _raise_version)
            with pytest.raises(VersionMismatch, match="version 9"):
                async with open_sender(receiver.url, os.urandom(16), b""):
                    pass
            assert receiver.statistics().dropped_messages >= 1

    run_trio(scenario)


def _raise_version(_message: object) -> None:
    raise VersionMismatch("of the future")


def test_an_answer_that_never_comes_ends_the_greeting() -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            with pytest.raises(PeerLost, match="neither accepted nor refused"):
                async with open_sender(
                    receiver.url, os.urandom(16), b"", SenderOptions(greeting_timeout_s=0.2)
                ):
                    pass

    run_trio(scenario)


def test_a_sender_that_gives_up_during_the_greeting_is_lost_to_the_receiver() -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            with trio.move_on_after(DEADLINE_S) as giving_up:
                async with trio.open_nursery() as nursery:

                    async def send() -> None:
                        async with open_sender(receiver.url, os.urandom(16), b""):
                            pass

                    nursery.start_soon(send)
                    await receiver.wait_hello()
                    giving_up.cancel()
            with pytest.raises(PeerLost):
                while True:
                    await receiver.wait_hello()
                    await trio.sleep(0.01)

    run_trio(scenario)


def test_nothing_can_be_said_before_the_greeting() -> None:
    async def scenario() -> None:
        async with open_receiver("tcp://127.0.0.1:*") as receiver:
            for call in (
                lambda: receiver.send_record(1, b""),
                lambda: receiver.accept(b""),
                lambda: receiver.refuse(b""),
                lambda: receiver.tunnel_send(b"1"),
            ):
                with pytest.raises(RuntimeError):
                    await call()
            with pytest.raises(RuntimeError):
                _ = receiver.seed

    run_trio(scenario)


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
            assert pair.receiver.statistics().records_received == 1

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
            pair.receiver._shared.start_closing(_DROP)
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
            pair.sender._shared.start_closing(_DROP)
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
            receiving=ReceiverOptions(peer_timeout_s=0.5),
        ) as pair:
            await trio.sleep(1.2)
            await pair.sender.send_record(1, b"", flush=True)
            assert pair.sender.statistics().round_trip_ns > 0

    run_trio(scenario)
