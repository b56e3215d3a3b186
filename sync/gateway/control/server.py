"""The gateway's end of the control protocol: requests are checked, executed and answered.

Sans-IO. Owned here: the check of role, lease and state that goes before a request, and what it
calls. Not owned: what its fields are (`requests`), what is done to the device (`jobs`), the bytes
(`wire`, `peer`).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from sync.errors import SyncError
from sync.gateway.control import requests
from sync.gateway.control.info import GatewayInfo, Upgraded
from sync.gateway.control.requests import REQUESTS, VERSION, Done, Request
from sync.gateway.control.shapes import ShapeError, pack, unpack
from sync.gateway.control.wire import MAX_DESCRIPTORS, ControlMessage, Fields
from sync.gateway.engine import device_steps as steps
from sync.gateway.engine import jobs
from sync.gateway.engine.core import Armed, Core, Lease
from sync.gateway.engine.custody import ClientRole, CustodyState
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.job_runner import Job
from sync.gateway.engine.replacement import Replacement
from sync.gateway.errors import (
    BadRequest,
    ControlVersionMismatch,
    DeviceTimeout,
    GatewayError,
    LayoutChanged,
    LeaseHeld,
    LeaseRequired,
    NoDevice,
    VmmOutOfReach,
    WrongSession,
    WrongState,
    told,
)
from sync.vfio_user.framing import close_fds
from sync.vmm import recover

T = TypeVar("T")

MAX_MESSAGE_CHARACTERS = 2000


class Client(Protocol):
    """What is known here of a control connection."""

    role: ClientRole | None
    session: str
    busy: bool

    @property
    def closed(self) -> bool: ...
    def reply(self, fields: Fields, blob: bytes, descriptors: Sequence[int]) -> None:
        """Answers the open request; owns `descriptors`."""


class ControlServer:
    """Every request of every client."""

    def __init__(self, core: Core) -> None:
        self._core = core
        # Each returns its reply, or None if a job will give it later.
        self._handlers: dict[type[Request[Any]], Callable[[Client, Any], object | None]] = {
            requests.ControlHello: self._hello,
            requests.Status: self._status,
            requests.Memory: self._memory,
            requests.ArmRecovery: self._arm_recovery,
            requests.DisarmRecovery: self._disarm_recovery,
            requests.TakeJournal: self._take_journal,
            requests.Release: self._release,
            requests.Reclaim: self._reclaim,
            requests.Vouch: self._vouch,
            requests.Moved: self._moved,
            requests.AskVerdict: self._verdict,
            requests.Own: self._own,
            requests.Running: self._running,
            requests.Fence: self._fence,
            requests.PrepareDevice: self._prepare_device,
            requests.SwitchDevice: self._switch_device,
            requests.Mediate: self._mediate,
            requests.CollectDirty: self._collect_dirty,
            requests.Recapture: self._recapture,
            requests.Batch: self._batch,
            requests.Stop: self._stop,
            requests.SetMigrationState: self._set_migration_state,
            requests.GetStateSize: self._get_state_size,
            requests.ReadDeviceState: self._read_device_state,
            requests.WriteDeviceState: self._write_device_state,
            requests.ResetDevice: self._reset_device,
            requests.Passthrough: self._passthrough,
            requests.Standby: self._standby,
            requests.Start: self._start,
            requests.Abandon: self._abandon,
            requests.Upgrade: self._upgrade,
        }

    def handle(self, client: Client, message: ControlMessage) -> None:
        """Takes a request; the client's `reply` is called now or later, exactly once."""
        client.busy = True
        try:
            request = _request(message)
        except GatewayError as error:
            _fail(client, error)
            return
        hello_to_stuck = self._core.stuck and isinstance(request, requests.ControlHello)
        if request.at_once or hello_to_stuck:
            self._dispatch(client, request)
        else:
            self._core.when_idle(
                lambda: self._dispatch(client, request),
                lambda: _fail(client, DeviceTimeout("the device is still at something else")),
            )

    def _dispatch(self, client: Client, request: Request[Any]) -> None:
        def answer() -> object | None:
            self._check(client, request)
            return self._handlers[type(request)](client, request)

        self._answer(client, answer)

    def _answer(self, client: Client, answer: Callable[[], object | None]) -> None:
        if client.closed:
            return
        try:
            reply = answer()
            if reply is not None:
                client.reply(*pack(reply, ok=True))
        except Exception as error:
            _fail(client, told(error))

    def _check(self, client: Client, request: Request[Any]) -> None:
        """Raises unless this client may ask for this now."""
        if isinstance(request, requests.ControlHello | requests.Upgrade):
            return
        lease = self._core.lease
        if client.role is None:
            raise LeaseRequired("'hello' comes first")
        if client.role not in request.roles:
            raise LeaseRequired(f"{request.op!r} is not for a client that is {client.role.value!r}")
        if lease is not None and lease.holder is client:
            lease.since = self._core.clock()
            if lease.broken is not None and not (request.at_once or request.after_loss):
                raise lease.broken
        custody = self._core.custody
        custody.check(request.states, request.op)
        if custody.holds_copy and isinstance(request, requests.Batch):
            raise WrongState("the device is left as its guest left it: start a new VMM here")

    # --- answered at once ---

    def _hello(self, client: Client, request: requests.ControlHello) -> GatewayInfo:
        if client.role is not None:
            raise BadRequest("'hello' is said once")
        if request.role is not ClientRole.OBSERVER:
            if self._core.lease is not None:
                holder = "send" if self._core.lease.role is ClientRole.SOURCE else "receive"
                raise LeaseHeld(
                    f"another process (a `{holder}`, or a `resolve`) has the lease of this "
                    "gateway: let it end first"
                )
            self._core.lease = Lease(client, request.role, self._core.clock())
            self._core.log_state("lease-taken", role=request.role.value)
        client.role, client.session = request.role, request.session
        return self._core.info()

    def _status(self, client: Client, request: requests.Status) -> GatewayInfo:
        return self._core.info()

    def _memory(self, client: Client, request: requests.Memory) -> requests.MemoryPart:
        link = self._link()
        generation = link.memory.generation
        if request.generation not in (None, generation):
            raise LayoutChanged
        flat = link.memory.flat()
        part = flat[request.start : request.start + MAX_DESCRIPTORS]
        descriptors: list[int] = []
        try:
            for region in part:
                descriptors.append(os.dup(region.descriptor))
        except OSError:
            close_fds(descriptors)
            raise
        return requests.MemoryPart(
            regions=tuple((r.iova, r.length, r.offset, r.writable) for r in part),
            generation=generation,
            total=len(flat),
            descriptors=tuple(descriptors),
        )

    def _arm_recovery(self, client: Client, request: requests.ArmRecovery) -> Done:
        if request.qmp_path and (why_not := recover.obstacle(request.qmp_path)):
            raise VmmOutOfReach(
                f"the gateway could not resume the VMM if this process died: it cannot open "
                f"{request.qmp_path} ({why_not}); run the gateway as the VMM's user, where it sees "
                "that path"
            )
        lease = self._lease()
        if not request.ran:
            self._core.custody.stands_still()
        lease.recovery = Armed(
            request.qmp_path,
            request.deadline_s,
            request.ran,
            request.put_back,
            request.silence_s,
            request.may_end_holder,
            request.companions,
            recover.socket_made(request.qmp_path),
        )
        return Done()

    def _disarm_recovery(self, client: Client, request: requests.DisarmRecovery) -> Done:
        self._lease().recovery = None
        return Done()

    def _take_journal(self, client: Client, request: requests.TakeJournal) -> requests.JournalPart:
        journal = self._link().journal
        return requests.JournalPart(journal.take(request.max_records), journal.overflow)

    def _release(self, client: Client, request: requests.Release) -> Done:
        self._core.custody.release(_session(client, request.session))
        self._lease().released = True
        return self._changed("released")

    def _reclaim(self, client: Client, request: requests.Reclaim) -> Done:
        lease = self._lease()
        session = _session(client, request.session)
        self._core.custody.reclaim(session, None if lease.released else request.proof)
        lease.released = False
        return self._changed("reclaimed")

    def _vouch(self, client: Client, request: requests.Vouch) -> Done:
        self._core.custody.vouch(_session(client, request.session))
        return self._changed("vouched")

    def _moved(self, client: Client, request: requests.Moved) -> Done:
        session = _session(client, request.session)
        self._core.custody.moved(session, None if self._lease().released else request.proof)
        self._core.log_state("moved")
        return Done()

    def _verdict(self, client: Client, request: requests.AskVerdict) -> requests.Verdict:
        record = self._core.custody.record(request.session)
        return requests.Verdict(
            session=record.session,
            role=ClientRole(record.role),
            fate=record.fate,
            decides=record.terms.decides,
            proof=record.proof,
            ran=record.ran,
            began=record.began,
            changed=record.changed,
        )

    def _own(self, client: Client, request: requests.Own) -> Done:
        link = self._link()
        steps.parse_records(link, request.records)
        first = not self._core.custody.owned
        self._core.custody.own(_session(client, request.session), ran=request.ran)
        if first:
            link.start_records = request.records
            self._core.log_state("owned")
        return Done()

    def _running(self, client: Client, request: requests.Running) -> Done:
        self._core.custody.running(_session(client, request.session))
        return Done()

    def _fence(self, client: Client, request: requests.Fence) -> Done:
        self._core.custody.fence(request.session)
        self._core.log_state("fenced")
        return Done()

    def _changed(self, event: str) -> Done:
        custody = self._core.custody
        if self._core.link is not None:
            self._core.link.enter(custody.state, shut=custody.shut)
        self._core.log_state(event)
        return Done()

    def _upgrade(self, client: Client, request: requests.Upgrade) -> None:
        def ended(outcome: Upgraded | GatewayError) -> None:
            if isinstance(outcome, GatewayError):
                _fail(client, outcome)
            else:
                self._answer(client, lambda: outcome)

        self._core.hand_on(ended)

    # --- done by the device ---

    def _mediate(self, client: Client, request: requests.Mediate) -> None:
        def reply(result: requests.Mediation) -> requests.Mediation:
            return replace(result, dirty=tuple(os.dup(ours) for ours in result.dirty))

        job = jobs.mediate(self._link(), self._core.custody, request, client.session)
        self._run(client, job, reply, held=True, event="mediated")

    def _prepare_device(self, client: Client, request: requests.PrepareDevice) -> None:
        core = self._core

        def done(error: SyncError | None) -> None:
            native = core.replacement is not None and core.replacement.native
            self._tell(client, requests.NewDevice(native), error)

        core.prepare_replacement(request.path, done)

    def _switch_device(self, client: Client, request: requests.SwitchDevice) -> None:
        def done(end: Replacement, error: SyncError | None) -> None:
            self._tell(client, requests.Switched(end.native, round(end.held_s * 1000, 3)), error)

        self._core.switch_device(done)

    def _tell(self, client: Client, reply: object, error: SyncError | None) -> None:
        if error is None:
            self._answer(client, lambda: reply)
        elif not client.closed:
            _fail(client, error)

    def _collect_dirty(self, client: Client, request: requests.CollectDirty) -> None:
        self._run(client, jobs.dirty(self._link()), lambda half: half, held=False)

    def _recapture(self, client: Client, request: requests.Recapture) -> None:
        job = jobs.recapture(self._link(), request.snapshot)
        self._run(client, job, lambda recaptured: recaptured, held=True)

    def _batch(self, client: Client, request: requests.Batch) -> None:
        job = jobs.batch(self._link(), request.records)
        self._run(client, job, requests.Records, held=True)

    def _stop(self, client: Client, request: requests.Stop) -> None:
        link = self._link()
        job = jobs.stop(link, self._core.custody, fence=request.fence, resume=request.resume)
        self._run(client, job, _done, held=True, event="stopped")

    def _set_migration_state(self, client: Client, request: requests.SetMigrationState) -> None:
        job = jobs.set_migration_state(self._link(), request.state)
        self._run(client, job, _done, held=False)

    def _get_state_size(self, client: Client, request: requests.GetStateSize) -> None:
        self._run(client, jobs.state_size(self._link()), requests.StateSize, held=False)

    def _read_device_state(self, client: Client, request: requests.ReadDeviceState) -> None:
        job = jobs.read_migration_data(self._link(), request.max_bytes)
        self._run(client, job, requests.DeviceState, held=False)

    def _write_device_state(self, client: Client, request: requests.WriteDeviceState) -> None:
        job = jobs.write_migration_data(self._link(), request.data)
        self._run(client, job, _done, held=False)

    def _reset_device(self, client: Client, request: requests.ResetDevice) -> None:
        self._run(client, jobs.reset_device(self._link()), _done, held=False)

    def _passthrough(self, client: Client, request: requests.Passthrough) -> Done | None:
        core = self._core
        if core.custody.state is CustodyState.PASSTHROUGH:
            return Done()
        job = jobs.restore(self._link(), core.custody)
        self._run(client, job, _done, held=True, event="restored")
        return None

    def _standby(self, client: Client, request: requests.Standby) -> None:
        session = _session(client, request.session)
        job = jobs.standby(self._link(), self._core.custody, session, request.terms)
        self._run(client, job, _done, held=True, event="standby")

    def _start(self, client: Client, request: requests.Start) -> None:
        job = jobs.start(self._link(), self._core.custody, request.records)
        self._run(client, job, _done, held=True, event="started")

    def _abandon(self, client: Client, request: requests.Abandon) -> Done | None:
        if self._core.custody.state is CustodyState.PASSTHROUGH:
            return Done()
        job = jobs.abandon(self._link(), self._core.custody)
        self._run(client, job, _done, held=True, event="abandoned")
        return None

    def _run(
        self,
        client: Client,
        job: Job[T],
        reply: Callable[[T], object],
        *,
        held: bool,
        event: str = "",
    ) -> None:
        def done(result: T) -> None:
            if event:
                self._core.log_state(event)
            self._answer(client, lambda: reply(result))

        def failed(error: SyncError) -> None:
            if not client.closed:
                _fail(client, error)

        self._core.run(job, done, failed, held=held)

    # --- what they share ---

    def _link(self) -> DeviceLink:
        link = self._core.link
        if link is None or not self._core.ready:
            raise NoDevice
        return link

    def _lease(self) -> Lease:
        lease = self._core.lease
        if lease is None:
            raise LeaseRequired
        return lease


def _request(message: ControlMessage) -> Request[Any]:
    """What a message asks for. Raises `BadRequest`, `ControlVersionMismatch`."""
    op = message.fields.get("op")
    shape = REQUESTS.get(op) if isinstance(op, str) else None
    if shape is None:
        raise BadRequest(f"there is no request {op!r}")
    # Before anything else is looked at, for other versions may have other fields.
    if shape is requests.ControlHello and (theirs := message.fields.get("version")) != VERSION:
        raise ControlVersionMismatch(
            f"the gateway speaks version {VERSION} of the control protocol, its client "
            f"{theirs!r:.20}: use the same release of vfio-ferry for both"
        )
    try:
        return unpack(shape, message, "op")
    except ShapeError as error:
        raise BadRequest(f"{op!r}: {error}") from error


def _session(client: Client, session: str) -> str:
    if client.session and session != client.session:
        raise WrongSession(f"this client came for session {client.session!r}, not {session!r}")
    return session


def _done(_: object) -> Done:
    return Done()


def _fail(client: Client, error: SyncError) -> None:
    code = error.code if isinstance(error, GatewayError) else GatewayError.code
    # It may quote the request, whose every character can take six in the reply.
    message = str(error)[:MAX_MESSAGE_CHARACTERS]
    client.reply({"ok": False, "error": code, "message": message}, b"", ())
