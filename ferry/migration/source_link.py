"""The source's end of the link to the receiver: opened once, listened to, closed with a goodbye.

Owns what the receiver says on it, and the order of records and rounds. What is sent when is
`ferry.migration.source`'s business.
"""

import contextlib
import socket
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any, Self

import numpy as np
import trio
from numpy.typing import NDArray

from ferry.errors import Mismatch, PeerAborted, Unreachable
from ferry.migration.conversation import EVENTS
from ferry.migration.device_watch import Verdict
from ferry.migration.endpoints import resolved, why_nobody_answers
from ferry.migration.handover_runner import HandoverRunner
from ferry.migration.listener import Listener
from ferry.migration.messages import MessageKind, MigrationHello, Notice, pack_state
from ferry.migration.send_options import Options, sender_options
from ferry.migration.tunnel import run_tunnel
from ferry.migration.vmm_stream import VmmStream
from sync.handover.states import Role
from transport.sender import RoundStatistics, Sender, open_sender
from transport.session.link import SessionEnd
from transport.wire.errors import PeerRefused, PeerUnreachable, TransportError

WATCHED_S = 600.0
"""How long the target may look whether its devices work; it is lost long before if it is silent."""
TELL_S = 1.0
"""How long the receiver may take to hear why the source gives up."""


class SourceLink:
    """One session with a receiver. What goes wrong with it, and what it says, goes to `runner`."""

    def __init__(self, sender: Sender, n_devices: int, runner: HandoverRunner) -> None:
        """Sessions are made by `open`."""
        self.sender = sender
        """The transport's session."""
        self._n_devices = n_devices
        self._runner = runner
        self._tunnel = trio.CancelScope()
        self._record_lock = trio.Lock()
        self._round_no = 0
        self.loaded = trio.Event()
        """The target's VMM has loaded all that came through the tunnel."""
        self.registers: list[dict[str, Any]] = []
        """What the target's check of the registers found; with `PEER_READY`."""
        self.ready_ms: dict[str, object] = {}
        """What it took on the target to become ready, by phase; with `PEER_READY`."""
        self.committed_ms: dict[str, object] = {}
        """What it took to start the guest there, by phase; with `PEER_COMMITTED`."""
        self.watched = Verdict()
        """Whether the devices work there; with `WATCHED`."""
        self._heard_all = trio.Event()

    @classmethod
    async def open(
        cls,
        options: Options,
        session: bytes,
        hello: MigrationHello,
        runner: HandoverRunner,
        held: contextlib.AsyncExitStack,
    ) -> Self:
        """Greets the receiver. The session lasts until `held` is closed: with a goodbye, or without
        one if that is because of an error or a cancellation.

        Raises `Mismatch` when the receiver refuses, `Unreachable` and `TransportError`.
        """
        url = await resolved(options.to)
        link = open_sender(url, session, hello.pack(), sender_options(options))
        try:
            sender = await held.enter_async_context(link)
        except PeerUnreachable as error:
            if why := await why_nobody_answers(url):
                raise Unreachable(why) from error
            raise
        except PeerRefused as refusal:
            reason = Notice.unpack(refusal.payload).text("reason")
            raise Mismatch(f"the receiver refuses: {reason}") from refusal
        return cls(sender, len(hello.devices), runner)

    async def listen(self) -> None:
        """Hears the receiver until the link ends, which the handover is told of."""
        await Listener(self.sender, self._runner, self._act).run()
        self._heard_all.set()

    async def wait_watched(self) -> Verdict:
        """Whether the devices work at the target, once it has looked, or has gone."""
        with trio.move_on_after(WATCHED_S):
            await self._heard_all.wait()
        return self.watched

    async def _act(self, kind: MessageKind, payload: bytes) -> None:
        """Acts on a message of the receiver."""
        if kind is MessageKind.LOADED:
            self.loaded.set()
            return
        notice = Notice.unpack(payload)
        error: PeerAborted | None = None
        if kind is MessageKind.READY:
            self.registers = notice.register_reports(self._n_devices)
            self.ready_ms = notice.mapping("ms")
        elif kind is MessageKind.COMMITTED:
            self.committed_ms = notice.mapping("ms")
        elif kind is MessageKind.WATCHED:
            self.watched = Verdict.told(notice.text("devices"), notice.text("text"))
            self._heard_all.set()
            return
        elif kind is MessageKind.START_FAILED:
            error = PeerAborted(f"target: {notice.text('reason')}")
        else:
            error = PeerAborted(f"the target gave up: {notice.text('reason')}")
        await self._runner.tell(EVENTS[Role.SOURCE][kind], error)

    async def send(self, kind: MessageKind, payload: bytes = b"", *, flush: bool = False) -> None:
        """Sends a message; they arrive in the order of the calls."""
        async with self._record_lock:
            await self.sender.send_record(kind, payload, flush=flush)

    async def send_state(self, device: int, payload: bytes) -> None:
        """Sends register state of the device of this number."""
        await self.send(MessageKind.STATE, pack_state(device, payload))

    async def send_pages(self, indices: NDArray[np.uint32]) -> RoundStatistics:
        """Sends these pages as a round of their own. Returns when the target has them."""
        self._round_no += 1
        return await self.sender.send_round(indices, self._round_no)

    async def carry_vmm_stream(
        self,
        vmm_stream: VmmStream,
        complete: Callable[[], Awaitable[bool]],
        *,
        task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Takes the VMM's connection and carries its stream across, until `cut_vmm_stream`. Has
        started with the path of the socket that it listens at; `complete` says, when the VMM
        closes the stream, whether the target may hear of it."""

        async def out(stream: trio.SocketStream, link: SessionEnd) -> None:
            await vmm_stream.carry(stream, link, complete)

        with self._tunnel:
            # Gone once the VMM has connected, so that nothing is left behind if we are killed.
            with tempfile.TemporaryDirectory(prefix="vfio-ferry-") as folder:
                path = f"{folder}/vmm.sock"
                listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                await listening.bind(path)
                listening.listen(1)
                async with trio.SocketListener(listening) as listener:
                    task_status.started(path)
                    stream = await listener.accept()
            await run_tunnel(stream, self.sender, self._runner, out)

    async def cut_vmm_stream(self) -> None:
        """Closes the VMM's connection: nothing more of its stream is carried."""
        self._tunnel.cancel()

    async def tell_abort(self) -> None:
        """Tells the receiver why the source gives up, as well as possible within a second, and past
        any message that waits for room."""
        reason = Notice({"reason": self._runner.reason[:1000]}).pack()
        with trio.move_on_after(TELL_S), contextlib.suppress(TransportError):
            await self.sender.send_record(MessageKind.ABORT, reason, flush=True)

    def wire_bytes(self) -> dict[str, int]:
        """Bytes that have crossed the link, by what they were."""
        totals = self.sender.statistics()
        return {"pages": totals.lane_bytes, "VMM stream": totals.tunnel_bytes_sent}

    def counts(self) -> dict[str, int]:
        """What became of the messages of the lanes: `Report.link`."""
        totals = self.sender.statistics()
        return {
            "resumed": self.sender.link.resumed,
            "messages": totals.lane_messages,
            "repeated_messages": totals.lost_messages,
        }
