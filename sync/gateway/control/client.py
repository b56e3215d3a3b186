"""The trio client of a gateway's control socket: what `send` and `receive` drive it with.

Owned here: one connection, its lease (by role) and its requests, one at a time. Not owned: what a
request does at the gateway (`requests` has the table of what is allowed when).
"""

import os
import socket
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import trio

from sync.gateway.control import requests
from sync.gateway.control.info import GatewayInfo
from sync.gateway.control.requests import (
    DirtyHalf,
    JournalPart,
    Mediation,
    Recaptured,
    Request,
    Tracker,
    Verdict,
)
from sync.gateway.control.shapes import ShapeError, pack, unpack
from sync.gateway.control.wire import MAX_DESCRIPTORS, ControlDecoder, ControlMessage, encode
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.records import NO_TERMS, Terms
from sync.gateway.errors import (
    AnswerLost,
    ControlProtocolError,
    GatewayLost,
    GatewayUnreachable,
    LayoutChanged,
    LeaseHeld,
    error_for,
)
from sync.memory import PAGE_BYTES, MemoryRegion
from sync.vfio_user.protocol import MigrationState

HELLO_DEADLINE_S = 5.0
"""For the first answer: something else than a gateway may listen there and say nothing."""
LEASE_WAIT_S = 1.0
LEASE_RETRY_S = 0.05
_CHUNK_BYTES = 256 << 10

R = TypeVar("R")


class GatewayClient:
    """One connection to a gateway. `async with await GatewayClient.connect(path) as gateway: ...`

    Every method raises the `GatewayError` that the gateway answered with, and `GatewayLost` when
    the connection is gone. A call that is cancelled leaves the connection usable, unless it was
    cut off in the middle of sending; what it asked for may have been done. `dirty`, `journal` and
    `mig_read` take what they return out of the gateway: if one of them is cut off, they raise
    `AnswerLost` from then on, until the next `mediate`. So shield them if that is not wanted.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._decoder = ControlDecoder(MAX_DESCRIPTORS)
        self._lock = trio.Lock()
        self._unread_replies = 0
        self._lost_answer = ""
        self._closed = False
        self.info: GatewayInfo
        """The status at the time of `connect`."""

    @classmethod
    async def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        role: ClientRole = ClientRole.OBSERVER,
        session: str = "",
    ) -> Self:
        """Connects and, as `source` or `target`, takes the lease for `session`.

        The lease ends with the connection; `custody` has what the gateway then does by itself. Who
        has it may have it for a moment only (`doctor`), or just have ended: so it is waited for.
        Raises `GatewayUnreachable`, `ControlVersionMismatch`, `LeaseHeld`.
        """
        until = trio.current_time() + LEASE_WAIT_S
        while True:
            try:
                return await cls._connect(path, role, session)
            except LeaseHeld:
                if trio.current_time() > until:
                    raise
            await trio.sleep(LEASE_RETRY_S)

    @classmethod
    async def _connect(cls, path: str | os.PathLike[str], role: ClientRole, session: str) -> Self:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await sock.connect(os.fspath(path))
        except OSError as error:
            sock.close()
            refused = isinstance(error, PermissionError)
            advice = "run this as the gateway's user" if refused else "is it running?"
            raise GatewayUnreachable(
                f"no gateway answers at {os.fspath(path)} ({error.strerror}): {advice}"
            ) from error
        client = cls(sock)
        no_gateway = (
            f"what listens at {os.fspath(path)} does not answer as a gateway does: is it the path "
            "of its --control?"
        )
        try:
            with trio.move_on_after(HELLO_DEADLINE_S) as waiting:
                hello = requests.ControlHello(requests.VERSION, role, session)
                client.info = await client._call(hello)
            if waiting.cancelled_caught:
                raise GatewayUnreachable(no_gateway)
        except (ControlProtocolError, GatewayLost) as error:
            client._close()
            raise GatewayUnreachable(no_gateway) from error
        except BaseException:
            client._close()
            raise
        return client

    async def status(self) -> GatewayInfo:
        return await self._call(requests.Status())

    async def memory(self) -> list[MemoryRegion]:
        """The guest memory that has a descriptor, by IOVA: the flat page space, in its order.

        The caller owns the descriptors. Raises `LayoutUnaligned`.
        """
        while True:
            regions: list[MemoryRegion] = []
            try:
                await self._collect_memory(regions)
                return regions
            except BaseException as error:
                for region in regions:
                    os.close(region.fd)
                if not isinstance(error, LayoutChanged):
                    raise

    async def _collect_memory(self, regions: list[MemoryRegion]) -> None:
        generation: int | None = None
        total = 1
        while len(regions) < total:
            part = await self._call(requests.Memory(len(regions), generation))
            generation, total = part.generation, part.total
            endless = not part.regions and len(regions) < total
            if endless or len(part.regions) != len(part.descriptors):
                _close_all(part.descriptors)
                raise ControlProtocolError("the gateway's memory map does not parse")
            for row, descriptor in zip(part.regions, part.descriptors, strict=True):
                regions.append(MemoryRegion(*row, fd=descriptor))

    async def arm_recovery(
        self,
        qmp_path: str,
        deadline_s: float,
        put_back: str = "",
        companions: Sequence[str] = (),
        *,
        ran: bool = True,
        silence_s: float = requests.MAX_RECOVERY_S,
        may_end_holder: bool = False,
    ) -> None:
        """If this lease is lost while the gateway owns the guest, the gateway resumes the VMM.

        It first puts its device back to passthrough, and those of the gateways whose control
        sockets are `companions`, then runs `sync.vmm.recover` on `qmp_path`, which gives the VMM
        the settings `put_back` back (`sync.vmm.settings`). It never does so once the guest is
        released (I7), nor without a path. `ran` is that of `states.resume_step`. A client that is
        silent for `silence_s` has lost its lease; with `may_end_holder` its process is ended if it
        keeps the VMM's QMP socket then.
        """
        await self._call(
            requests.ArmRecovery(
                qmp_path, deadline_s, ran, put_back, silence_s, may_end_holder, tuple(companions)
            )
        )

    async def disarm_recovery(self) -> None:
        """From here on the VMM is left alone when the lease ends."""
        await self._call(requests.DisarmRecovery())

    async def mediate(
        self,
        *,
        tracker: Tracker,
        page_size: int = PAGE_BYTES,
        capture: bool,
        snapshot: bytes = b"",
        terms: Terms = NO_TERMS,
    ) -> Mediation:
        """passthrough -> mediated, in one step that the guest sees nothing of.

        `snapshot` holds records of 32 bytes that are executed between two accesses of the guest;
        with `capture` the journal begins exactly there. `page_size` (bytes) is a wish to a device
        that logs. The session of `connect` gets a record on `terms`. Raises `Unsupported`,
        `DeviceRefused`, `LayoutUnaligned`; the gateway is then in passthrough again.
        """
        return await self._call(requests.Mediate(tracker, page_size, capture, snapshot, terms))

    async def dirty(self) -> DirtyHalf:
        """Reads and clears (I1): the half returned is quiet now.

        The caller reads it and writes zeros over it before it calls again. A `layout_generation`
        other than that of `mediate` says that the guest's memory map has changed, so that the
        bitmap no longer covers all of it.
        """
        return await self._call(requests.CollectDirty())

    async def journal(self, max_records: int = 65536) -> JournalPart:
        """Takes up to `max_records` (at most 131072) of the oldest records out of the gateway."""
        return await self._call(requests.TakeJournal(max_records))

    async def recapture(self, snapshot: bytes) -> Recaptured:
        """Begins the journal anew, as `mediate` did, with the records of a new snapshot."""
        return await self._call(requests.Recapture(snapshot))

    async def batch(self, records: bytes) -> bytes:
        """Executes records back to back, no access of the guest between them.

        Returns them with what was read filled in, and `FAILED` where the device answered an error.
        """
        return (await self._call(requests.Batch(records))).records

    async def stop(self, *, fence: bool, resume: bytes = b"") -> None:
        """mediated -> stopped. The VMM is paused by now.

        `fence` takes all memory away from the device and waits until it has let go. `resume` holds
        the records to execute when the device is started again here.
        """
        await self._call(requests.Stop(fence, resume))

    async def mig_state(self, state: MigrationState) -> None:
        """Sets the device's migration state (VFIO migration v2)."""
        await self._call(requests.SetMigrationState(state))

    async def mig_size(self) -> int | None:
        """How many bytes of state the device estimates to have; None if it does not tell."""
        return (await self._call(requests.GetStateSize())).bytes

    async def mig_read(self, max_bytes: int) -> bytes:
        """Reads device state. Fewer bytes than asked for, or none, mean that there is no more now.

        The device's transfer size bounds what one call returns; the gateway asks again until
        `max_bytes` (at most 4 MiB) are there or the device has no more.
        """
        return (await self._call(requests.ReadDeviceState(max_bytes))).data

    async def mig_write(self, data: bytes) -> None:
        """Writes device state, at most 4 MiB at a time."""
        await self._call(requests.WriteDeviceState(data))

    async def reset_device(self) -> None:
        await self._call(requests.ResetDevice())

    async def passthrough(self) -> None:
        """mediated | stopped -> passthrough: undoes `mediate` and `stop`, the device runs on."""
        await self._call(requests.Passthrough())

    async def release(self, session: str) -> None:
        """stopped -> released. From here on nothing starts this device but `reclaim` (I7)."""
        await self._call(requests.Release(session))

    async def reclaim(self, session: str, proof: str = "") -> None:
        """released -> stopped. Who released it himself needs no `proof` that the target is fenced:
        he has sent no commit, or the target told him. Raises `NotProven`."""
        await self._call(requests.Reclaim(session, proof))

    async def vouch(self, session: str) -> None:
        """`reclaim` on an operator's word that the guest runs nowhere else and never will."""
        await self._call(requests.Vouch(session))

    async def moved(self, session: str, proof: str = "") -> None:
        """The commit was answered, or `proof` says that the target has the guest."""
        await self._call(requests.Moved(session, proof))

    async def verdict(self, session: str = "") -> Verdict:
        """What is on record of `session`, or of the one in doubt. Raises `UnknownSession`."""
        return await self._call(requests.AskVerdict(session))

    async def prepare_device(self, path: str) -> requests.NewDevice:
        """Has the device that listens at `path` ready to take the place of the guest's, which works
        on. It is dropped with this connection. Raises `AnotherDevice`, `NewDeviceUnreachable`,
        `NoVmm`, `Unsupported`."""
        return await self._call(requests.PrepareDevice(path))

    async def switch_device(self) -> requests.Switched:
        """The prepared device takes the place of the guest's, between two of its accesses. If that
        fails the guest's device goes on."""
        return await self._call(requests.SwitchDevice())

    async def standby(self, session: str, terms: Terms = NO_TERMS) -> None:
        """passthrough -> standby: the device is reset and has no memory; nothing is owned."""
        await self._call(requests.Standby(session, terms))

    async def own(self, session: str, records: bytes = b"", *, ran: bool = True) -> None:
        """The commit point of the target: the ownership record, with whether the guest `ran` at
        the source, and `records` to start with.

        The gateway keeps `records`, so that anybody can start the guest if this process is killed.
        Asked for again by the same session it changes nothing.
        """
        await self._call(requests.Own(session, ran, records))

    async def start(self, records: bytes = b"") -> None:
        """standby -> passthrough, after `own`: memory, RUNNING, the records given to `own` and then
        `records`, every vector once. If it fails it can be asked for again."""
        await self._call(requests.Start(records))

    async def running(self, session: str) -> None:
        """Notes that the guest was set running."""
        await self._call(requests.Running(session))

    async def fence(self, session: str) -> None:
        """`session` can never run the guest here. Raises `WrongState` if it may have."""
        await self._call(requests.Fence(session))

    async def abandon(self) -> None:
        """standby -> passthrough without owning; the session is fenced."""
        await self._call(requests.Abandon())

    async def aclose(self) -> None:
        """Closes the connection; a lease ends with it."""
        self._close()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._sock.close()
            self._decoder.close()

    async def _call(self, request: Request[R]) -> R:
        message = pack(request, op=request.op)
        reply = await self._exchange(message, request)
        try:
            return unpack(request.reply(), reply, "ok")
        except ShapeError as error:
            _close_all(reply.descriptors)
            raise ControlProtocolError(
                f"the gateway's answer to {request.op!r} does not parse: {error}"
            ) from error

    async def _exchange(self, message: ControlMessage, request: Request[Any]) -> ControlMessage:
        data = encode(message.fields, message.blob)
        async with self._lock:
            if self._closed:
                raise GatewayLost("the gateway has closed its control connection")
            if request.takes and self._lost_answer:
                raise AnswerLost(f"the answer to {self._lost_answer!r} was cut off: mediate anew")
            await self._send(data)
            if isinstance(request, requests.Mediate):
                self._lost_answer = ""
            self._unread_replies += 1
            try:
                reply = await self._receive_last()
            except trio.Cancelled:
                if request.takes:
                    self._lost_answer = request.op
                raise
        if reply.fields.get("ok") is not True:
            _close_all(reply.descriptors)
            raise error_for(str(reply.fields.get("error")), str(reply.fields.get("message")))
        return reply

    async def _receive_last(self) -> ControlMessage:
        while True:
            reply = await self._receive()
            self._unread_replies -= 1
            if not self._unread_replies:
                return reply
            _close_all(reply.descriptors)

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[await self._sock.send(view) :]
        except OSError as error:
            self._close()
            raise GatewayLost(f"the gateway is gone ({error.strerror})") from error
        except trio.Cancelled:
            if len(view) != len(data):
                self._close()
            raise

    async def _receive(self) -> ControlMessage:
        while (message := self._decoder.next_message()) is None:
            try:
                data, ancillary, flags, _ = await self._sock.recvmsg(
                    _CHUNK_BYTES, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
                )
            except OSError as error:
                self._close()
                raise GatewayLost(f"the gateway is gone ({error.strerror})") from error
            descriptors = _descriptors(ancillary)
            try:
                self._decoder.feed(data, descriptors)
                if flags & socket.MSG_CTRUNC:
                    raise ControlProtocolError("the gateway sent too many descriptors")
            except ControlProtocolError:
                self._close()
                raise
            if not data:
                self._close()
                raise GatewayLost("the gateway closed the control connection")
        return message


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    descriptors: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            usable = len(data) - len(data) % 4
            descriptors += memoryview(data)[:usable].cast("i").tolist()
    return descriptors


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
