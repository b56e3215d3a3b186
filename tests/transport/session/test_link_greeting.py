"""Endpoints and the greeting, over real sockets: who gets a session and who does not."""

import os
import socket
import stat
import struct
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import zmq

from tests.transport import running
from transport.receiver import open_receiver
from transport.sender import SenderOptions, open_sender
from transport.session.sockets import listening_url
from transport.wire.errors import (
    EndpointError,
    PeerClosed,
    PeerLost,
    PeerRefused,
    PeerUnreachable,
    VersionMismatch,
)
from transport.wire.records import MAX_RECORD_BYTES, MessageType, Ping, Pong, message_type

DEADLINE_S = 10
run_trio = partial(running.run_trio, deadline_s=DEADLINE_S)


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
        "tcp://127.0.0.1:*",
        "tcp://*:5000",
        "tcp://127.0.0.1:5000/path",
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


def test_a_name_that_has_only_an_ipv6_address_can_be_listened_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *_, **__: [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))],
    )

    async def scenario() -> None:
        async with open_receiver("tcp://target.example:*") as receiver:
            assert receiver.url.startswith("tcp://[::1]:")
            port = receiver.url.rpartition(":")[2]
            async with trio.open_nursery() as nursery:

                async def accept() -> None:
                    await receiver.wait_hello()
                    await receiver.accept(b"")

                nursery.start_soon(accept)
                async with open_sender(f"tcp://[::1]:{port}", bytes(16), b""):
                    pass

    run_trio(scenario)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(socket.AF_INET6, "::1"), (socket.AF_INET, "10.0.0.1")], "tcp://10.0.0.1:5000"),
        ([(socket.AF_INET6, "fe80::1%eth0")], "tcp://[fe80::1%eth0]:5000"),
    ],
)
def test_the_address_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, rows: list[tuple[int, str]], expected: str
) -> None:
    found = [(family, socket.SOCK_STREAM, 6, "", (address, 0)) for family, address in rows]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert listening_url("tcp://target.example:5000") == expected


@pytest.mark.parametrize(
    "url", ["tcp://10.0.0.1:5", "tcp://[::1]:5", "tcp://*:5", "tcp://lo:5", "ipc:///tmp/x"]
)
def test_what_is_no_name_is_asked_of_nobody(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.delattr(socket, "getaddrinfo")
    assert listening_url(url) == url


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 64 + ".example", "a..b"])
def test_a_host_that_is_not_known_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """It was "nobody answers", after a while."""
    real = socket.getaddrinfo

    def without_a_server(name: str, *rest: Any, **named: Any) -> Any:
        if name.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(name, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", without_a_server)

    async def scenario() -> None:
        with pytest.raises(EndpointError, match=rf"there is no host '{host}' \("):
            async with open_receiver(f"tcp://{host}:5000"):
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


def test_a_receiver_that_was_restarted_is_greeted_again(raw_zmtp: Any) -> None:
    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        async with trio.open_nursery() as nursery:
            closed = trio.Event()

            async def send() -> None:
                async with open_sender(url, bytes(16), b"again") as sender:
                    assert sender.hello_reply == b"there"
                closed.set()

            nursery.start_soon(send)
            # The first one hears the greeting and goes away without a word.
            connection = await trio.to_thread.run_sync(raw_zmtp.accept, listener)
            with listener, connection:
                assert b"again" in await trio.to_thread.run_sync(connection.recv, 4096)
            async with open_receiver(url) as receiver:
                assert (await receiver.wait_hello()).payload == b"again"
                await receiver.accept(b"there")
                await closed.wait()

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
            monkeypatch.setattr("transport.wire.records.HelloReply.pack", lambda self: packed)
            monkeypatch.setattr("transport.wire.records.SessionHello.unpack", _raise_version)
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


def test_a_receiver_that_leaves_before_its_verdict_makes_room_for_the_next(
    socket_folder: Path,
) -> None:
    """One that has turned somebody away may take a greeting in its last moment."""
    url = f"ipc://{socket_folder}/link"

    def show_life_and_leave(router: zmq.Socket[bytes]) -> None:
        while True:
            identity, message = router.recv_multipart()
            if message_type(message) == MessageType.PING:
                router.send_multipart((identity, Pong(Ping.unpack(message).value).pack()))
                router.close(linger=DEADLINE_S * 1000)
                return

    async def scenario() -> None:
        with zmq.Context() as context:
            router = context.socket(zmq.ROUTER)
            router.bind(url)
            async with trio.open_nursery() as nursery:

                async def next_one() -> None:
                    await trio.to_thread.run_sync(show_life_and_leave, router)
                    await trio.to_thread.run_sync(context.term)
                    async with open_receiver(url) as receiver:
                        await receiver.wait_hello()
                        await receiver.accept(b"come in")
                        await receiver.receive_record()

                nursery.start_soon(next_one)
                async with open_sender(url, os.urandom(16), b"") as sender:
                    assert sender.hello_reply == b"come in"
                    await sender.send_record(1, b"", flush=True)

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
            calls: list[Callable[[], Awaitable[None]]] = [
                lambda: receiver.send_record(1, b""),
                lambda: receiver.accept(b""),
                lambda: receiver.refuse(b""),
                lambda: receiver.tunnel_send(b"1"),
            ]
            for call in calls:
                with pytest.raises(RuntimeError):
                    await call()
            with pytest.raises(RuntimeError):
                _ = receiver.seed

    run_trio(scenario)
