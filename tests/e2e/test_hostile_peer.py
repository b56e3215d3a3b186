"""A peer that does not keep to the protocol, over a real link, against a real `send` and `receive`.

The peer is played by the test, which runs `send` or `receive` in its own process.
"""

import contextlib
import io
import json
import os
import secrets
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from ferry.commands.receive import receive
from ferry.commands.send import send
from ferry.errors import Exit
from ferry.migration.devices import offer_of, view_of
from ferry.migration.memory_layout import MemoryLayout
from ferry.migration.messages import MessageKind, MigrationHello, pack_state
from ferry.migration.receive_options import Options as ReceiveOptions
from ferry.migration.send_options import Options as SendOptions
from ferry.migration.stop_request import StopRequest
from ferry.nurseries import alongside
from ferry.progress import Reporter
from lab.testbed import Host
from sync.gateway.control.client import GatewayClient
from sync.registers.choose import source_for
from sync.registers.find import load_profiles
from sync.vmm.driver import Vmm
from sync.vmm.identity import identify
from tests.e2e.two_hosts import (
    RESUME_WINDOW_S,
    Method,
    assert_sound,
    new_bed,
    small_setup,
    start_both,
)
from transport.receiver import Receiver, ReceiverOptions, open_receiver
from transport.sender import open_sender
from transport.wire.errors import PeerClosed, PeerLost, PeerRefused, TransportError

METHOD = Method("v2", "message")
REPEATED = 20_000
PATIENCE_S = 60.0


class TaskCount(trio.abc.Instrument):
    """How many tasks the loop has ever started."""

    def __init__(self) -> None:
        self.spawned = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.spawned += 1


async def greeting_of(host: Host, session: bytes) -> bytes:
    """What a `send` would say whose devices and memory are those of `host`."""
    async with await Vmm.connect(str(host.qmp_socket)) as vmm:
        identity = await identify(vmm)
    async with await GatewayClient.connect(host.control_socket) as gateway:
        info = await gateway.status()
        regions = await gateway.memory()
        registers = source_for(view_of(info), gateway, load_profiles(), "v2")
        files, layout = MemoryLayout.of(regions).rows()
        for region in regions:
            os.close(region.fd)
        return MigrationHello(
            session=session.hex(),
            devices=[offer_of(info, await registers.offer())],
            layout=layout,
            files=files,
            vmm=asdict(identity),
        ).pack()


@pytest.mark.parametrize(
    ("kind", "payload", "times"),
    [
        (MessageKind.ASK_LOADED, b"", REPEATED),
        (MessageKind.PLATFORM, b"", 2),
        (MessageKind.COMMIT, b"", 1),
        (MessageKind.READY, b"", 1),
        (MessageKind.PROBE, b"", 1),
        (MessageKind.STATE, pack_state(1, b""), 1),
        (200, b"", 1),
    ],
)
def test_i9_a_hostile_sender(tmp_path: Path, kind: int, payload: bytes, times: int) -> None:
    """`receive` takes it for what it is, and nothing that is repeated is begun twice."""
    counted = TaskCount()
    codes: list[Exit] = []

    async def listen(host: Host, url: str) -> None:
        options = ReceiveOptions(
            gateway=(str(host.control_socket),), listen=url, qmp=str(host.qmp_socket)
        )
        codes.append(
            await receive(options, Reporter("receive", as_json=True, stream=io.StringIO()))
        )

    async def attack(host: Host) -> None:
        url = f"ipc://{host.folder}/link.sock"
        session = secrets.token_bytes(16)
        hello = await greeting_of(host, session)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, host, url)
            with pytest.raises(TransportError):
                async with open_sender(url, session, hello) as link:
                    before = counted.spawned
                    for _ in range(times):
                        await link.send_record(kind, payload)
                    await link.tunnel_receive()  # until the receiver has had enough
        assert counted.spawned - before < 200

    async def main() -> None:
        trio.lowlevel.add_instrument(counted)
        with trio.fail_after(PATIENCE_S):
            await attack(bed.hosts["b"])

    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        bed.start_host(bed.hosts["b"], incoming=True)
        trio.run(main)
    assert codes == [Exit.PEER_PROTOCOL]


SOON_LOST = ReceiverOptions(resume_window_s=RESUME_WINDOW_S)


async def accept(link: Receiver) -> None:
    """Takes the next sender's session, with as much memory as it has."""
    hello = MigrationHello.unpack((await link.wait_hello()).payload)
    await link.accept(b"")
    link.attach_memory(np.zeros(sum(row[1] for row in hello.layout), np.uint8))


@pytest.mark.parametrize(
    "kind", [MessageKind.READY, MessageKind.LOADED, MessageKind.COMMITTED, 200]
)
def test_i8_i9_a_hostile_receiver(tmp_path: Path, kind: int) -> None:
    """`send` takes it for what it is, and the guest goes on at the source."""

    async def answer(url: str) -> None:
        async with open_receiver(url, SOON_LOST) as link:
            await accept(link)
            with pytest.raises(TransportError):
                await link.send_record(kind, b"{}")
                await link.tunnel_send(bytes(1 << 30))  # until the sender has had enough

    async def main(host: Host) -> Exit:
        url = f"ipc://{host.folder}/hostile.sock"
        options = SendOptions(
            gateway=(str(host.control_socket),), to=url, qmp=str(host.qmp_socket), dirty="message"
        )
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer, url)
                reporter = Reporter("send", as_json=True, stream=io.StringIO())
                return await send(options, reporter)

    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, _ = start_both(bed)
        assert trio.run(main, a) == Exit.PEER_PROTOCOL
        assert_sound(bed, a)


def open_files() -> set[str]:
    """The sockets and files that are open in this process. (libzmq keeps events of its own.)"""
    opened = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that the folder is read by
            opened.add(str(entry.readlink()))
    return {name for name in opened if not name.startswith("anon_inode:")}


class EndAt(Reporter):
    """Cancels `scope` when a phase begins, as if the process had been killed there."""

    def __init__(self, phase: str, scope: trio.CancelScope) -> None:
        super().__init__("send", as_json=True, stream=io.StringIO())
        self._phase = phase
        self._scope = scope

    def event(self, name: str, /, **values: Any) -> None:
        super().event(name, **values)
        if values.get("phase") == self._phase:
            self._scope.cancel()


@pytest.mark.parametrize("phase", ["mediating", "precopy", "pausing", "stopping"])
def test_i8_a_cancelled_send_is_as_one_that_was_killed(tmp_path: Path, phase: str) -> None:
    """It says nothing to anybody and keeps no descriptor; its gateway lets the guest go on."""
    told: list[int] = []

    async def hear(url: str) -> None:
        async with open_receiver(url, SOON_LOST) as link:
            await accept(link)
            with pytest.raises(PeerLost) as caught:
                async with alongside(partial(take_vmm_stream, link)):
                    while True:
                        told.append((await link.receive_record()).kind)
            assert not isinstance(caught.value, PeerClosed)

    async def take_vmm_stream(link: Receiver) -> None:
        while await link.tunnel_receive():
            pass

    async def main(host: Host) -> None:
        url = f"ipc://{host.folder}/hostile.sock"
        options = SendOptions(
            gateway=(str(host.control_socket),),
            to=url,
            qmp=str(host.qmp_socket),
            dirty="message",
        )
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hear, url)
                with trio.CancelScope() as scope:
                    await send(options, EndAt(phase, scope))
                assert scope.cancelled_caught

    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        a, _ = start_both(bed)
        before = open_files()
        trio.run(main, a)
        deadline = time.monotonic() + PATIENCE_S
        while not (left := open_files()) <= before:
            # libzmq closes its sockets in a thread of its own.
            assert time.monotonic() < deadline, left - before
            time.sleep(0.02)
        assert MessageKind.ABORT not in told
        assert_sound(bed, a)


def test_a_greeting_that_makes_no_sense_leaves_the_receiver_listening(tmp_path: Path) -> None:
    said = io.StringIO()
    stop = StopRequest()
    codes: list[Exit] = []

    async def listen(host: Host, url: str) -> None:
        options = ReceiveOptions(
            gateway=(str(host.control_socket),), listen=url, qmp=str(host.qmp_socket)
        )
        codes.append(await receive(options, Reporter("receive", as_json=True, stream=said), stop))

    async def main(host: Host) -> None:
        url = f"ipc://{host.folder}/link.sock"
        session = secrets.token_bytes(16)
        sound = await greeting_of(host, session)
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen, host, url)
                for greeting in (b"nonsense", b"{}", b'{"version": 99}'):
                    with pytest.raises(PeerRefused):
                        async with open_sender(url, secrets.token_bytes(16), greeting):
                            pass
                with pytest.raises(TransportError):
                    async with open_sender(url, session, sound) as link:
                        stop.ask("enough")
                        await link.tunnel_receive()  # until the receiver has ended

    with new_bed(tmp_path, small_setup(METHOD)) as bed:
        bed.start_host(bed.hosts["b"], incoming=True)
        trio.run(main, bed.hosts["b"])
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [event["event"] for event in events].count("refused") == 3
    assert [event["event"] for event in events].count("listening") == 4
    assert codes == [Exit.INTERRUPTED]
