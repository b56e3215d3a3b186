"""The QMP client on a real socket: concurrency, deadlines, cancellation, loss."""

from typing import Any

import pytest
import trio
import trio.testing

from sync.vmm.client import QmpClient
from sync.vmm.errors import QmpProtocolError, VmmGone, VmmNotReady, VmmRefused


def test_execute_returns_what_the_vmm_returns(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await QmpClient.connect(qemu.path) as client:
            assert client.version["qemu"]["major"] == 11
            answer = await client.execute("query-status")
            assert answer == {"status": "running", "running": True}
            qemu.errors["cont"] = "no"
            with pytest.raises(VmmRefused) as refusal:
                await client.execute("cont")
            assert (refusal.value.command, refusal.value.description) == ("cont", "no")
            assert refusal.value.error_class == "GenericError"

    with_qemu(body)


def test_an_event_in_front_of_the_greeting_is_an_event(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.event("RESUME")
        async with await QmpClient.connect(qemu.path) as client:
            assert client.last_event("RESUME") is not None
            assert (await client.execute("query-status"))["running"]

    with_qemu(body)


def test_many_tasks_may_use_it_at_once(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await QmpClient.connect(qemu.path) as client:
            answers: list[Any] = []

            async def ask(name: str) -> None:
                answers.append((name, await client.execute(name)))

            async with trio.open_nursery() as nursery:
                for name in ("query-status", "query-migrate", "query-migrate-capabilities") * 5:
                    nursery.start_soon(ask, name)
            assert len(answers) == 15
            assert all(answer == qemu.query(name) for name, answer in answers)

    with_qemu(body)


def test_no_reply_in_time_is_told_and_a_late_one_does_no_harm(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await QmpClient.connect(qemu.path) as client:
            qemu.silent.add("stop")
            with pytest.raises(VmmNotReady):
                await client.execute("stop", deadline_s=0.02)
            with trio.move_on_after(0.02):
                await client.execute("stop")
            await qemu._write(
                qemu._streams[0], b'{"return": {}, "id": 2}\n{"return": {}, "id": 3}\n'
            )
            assert (await client.execute("query-status"))["running"]
            assert not client._replies and not client._abandoned
            with pytest.raises(QmpProtocolError):
                await qemu._write(qemu._streams[0], b'{"return": {}, "id": 3}\n')
                await client.wait_event(since=0)

    with_qemu(body)


def test_events_are_kept_with_their_time(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await QmpClient.connect(qemu.path) as client:
            mark = client.events_seen
            qemu.event("STOP", seconds=11)
            qemu.event("RESUME", seconds=12)
            qemu.event("STOP", seconds=13)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: client.wait_event(since=mark))
                nursery.start_soon(lambda: client.wait_event(since=mark + 2))
                await qemu.send_events()
            stop = client.last_event("STOP")
            assert stop is not None and stop.timestamp == 13.25
            assert client.last_event("STOP", since=mark + 3) is None
            resume = client.last_event("RESUME", since=mark)
            assert resume is not None and resume.timestamp == 12.25

    with_qemu(body)


def test_the_end_of_the_connection_reaches_everybody_who_waits(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await QmpClient.connect(qemu.path) as client:
            qemu.silent.add("stop")
            gone = 0

            async def wait(command: str | None) -> None:
                nonlocal gone
                with pytest.raises(VmmGone):
                    if command is None:
                        await client.wait_event(since=client.events_seen)
                    else:
                        await client.execute(command)
                gone += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, None)
                nursery.start_soon(wait, "stop")
                nursery.start_soon(wait, "stop")
                await trio.testing.wait_all_tasks_blocked()
                await qemu.hang_up()
            assert gone == 3
            with pytest.raises(VmmGone):
                await client.execute("query-status")

    with_qemu(body)


def test_i9_nonsense_ends_the_connection(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await QmpClient.connect(qemu.path) as client:
            await qemu._write(qemu._streams[0], b"nonsense\n")
            for _ in range(2):
                with pytest.raises(QmpProtocolError):
                    await client.execute("query-status")

    with_qemu(body)


def test_connecting_waits_for_the_socket_and_for_its_turn(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        first = await QmpClient.connect(qemu.path)
        with pytest.raises(VmmGone, match="another client"):
            await QmpClient.connect(qemu.path, deadline_s=0.05)
        with pytest.raises(VmmGone, match="No such file"):
            await QmpClient.connect(qemu.path + "-not", deadline_s=0.05)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def second() -> None:
                async with await QmpClient.connect(qemu.path) as client:
                    await client.execute("query-status")

            await trio.testing.wait_all_tasks_blocked()
            await first.aclose()

    with_qemu(body)


class LateStream:
    """Its `send_all` returns when the answer has long been read by whoever reads."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.receive_some = stream.receive_some
        self.aclose = stream.aclose
        self._stream = stream

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(data)
        await trio.testing.wait_all_tasks_blocked(0.05)


def test_a_reply_that_another_task_has_read_is_not_waited_for(
    with_qemu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = trio.open_unix_socket

    async def connect_late(path: str) -> LateStream:
        return LateStream(await connect(path))

    async def body(qemu: Any) -> None:
        monkeypatch.setattr(trio, "open_unix_socket", connect_late)
        async with await QmpClient.connect(qemu.path) as client, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: client.wait_event(since=client.events_seen))
            await trio.testing.wait_all_tasks_blocked()
            await client.execute("query-status", deadline_s=1.0)
            nursery.cancel_scope.cancel()

    with_qemu(body)
