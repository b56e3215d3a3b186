"""The requests of the control protocol: checked, executed, answered.

Sans-IO. Owned here: the fields of each request and of its reply, and the check of role, lease and
state that goes before it. Not owned: what is done to the device (`jobs`), the bytes (`control`).
"""

import os
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from sync.errors import SyncError
from sync.gateway.control.wire import (
    MAX_BLOB_BYTES,
    MAX_DESCRIPTORS,
    ControlMessage,
    Fields,
    boolean,
    integer,
    number,
    session,
    text,
)
from sync.gateway.engine import device_steps as steps
from sync.gateway.engine import jobs
from sync.gateway.engine.core import Core, Lease
from sync.gateway.engine.custody import REQUESTS, Role, State
from sync.gateway.engine.device_link import Link
from sync.gateway.engine.job_runner import Job
from sync.gateway.errors import (
    BadRequest,
    GatewayError,
    LayoutChanged,
    LeaseHeld,
    LeaseRequired,
    NoDevice,
    WrongSession,
)
from sync.registers.record import RECORD_BYTES
from sync.vfio_user.framing import close_fds
from sync.vfio_user.protocol import MigrationState

MAX_JOURNAL_RECORDS = MAX_BLOB_BYTES // RECORD_BYTES
MAX_RECOVERY_S = 600.0
MAX_PAGE_BYTES = 1 << 30
_PATH_CHARACTERS = 4096

_AT_ONCE = frozenset({"status", "memory"})
"""Answered whatever the device is doing: they change nothing that a job under way relies on."""
_AFTER_LOSS = frozenset({"passthrough", "abandon", "arm_recovery", "disarm_recovery"})
"""What a controller whose session has ended may still ask for, beside `_AT_ONCE`."""

T = TypeVar("T")
Outcome = tuple[Fields, bytes, Sequence[int]]


class Client(Protocol):
    """What the requests know of a control connection."""

    role: Role | None
    session: str
    busy: bool

    @property
    def closed(self) -> bool: ...
    def reply(self, fields: Fields, blob: bytes, descriptors: Sequence[int]) -> None:
        """Answers the open request; owns `descriptors`."""


class Requests:
    """Every request of every client."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._immediate: dict[str, Callable[[Client, ControlMessage], Outcome]] = {
            "status": self._status,
            "memory": self._memory,
            "arm_recovery": self._arm_recovery,
            "disarm_recovery": self._disarm_recovery,
            "journal": self._journal,
            "release": self._release,
            "reclaim": self._reclaim,
            "own": self._own,
            "fence": self._fence,
        }
        self._jobs: dict[str, Callable[[Client, ControlMessage], None]] = {
            "mediate": self._mediate,
            "dirty": self._dirty,
            "batch": self._batch,
            "stop": self._stop,
            "mig_state": self._mig_state,
            "mig_state_get": self._mig_state_get,
            "mig_read": self._mig_read,
            "mig_write": self._mig_write,
            "reset_device": self._reset_device,
            "passthrough": self._passthrough,
            "standby": self._standby,
            "start": self._start,
            "abandon": self._abandon,
        }

    def handle(self, client: Client, message: ControlMessage) -> None:
        """Takes a request; the client's `reply` is called now or later, exactly once."""
        client.busy = True
        op = message.fields.get("op")
        if op == "hello":
            self._core.when_idle(lambda: self._guard(client, lambda: self._hello(client, message)))
        elif not isinstance(op, str) or op not in REQUESTS:
            _fail(client, BadRequest(f"there is no request {op!r}"))
        elif op in _AT_ONCE:
            self._guard(client, lambda: self._dispatch(client, op, message))
        else:
            self._core.when_idle(
                lambda: self._guard(client, lambda: self._dispatch(client, op, message))
            )

    def _guard(self, client: Client, action: Callable[[], None]) -> None:
        if client.closed:
            return
        try:
            action()
        except GatewayError as error:
            _fail(client, error)
        except OSError as error:
            _fail(client, GatewayError(f"the gateway lacks something: {error.strerror}"))

    def _dispatch(self, client: Client, op: str, message: ControlMessage) -> None:
        roles, _ = REQUESTS[op]
        lease = self._core.lease
        if client.role is None:
            raise LeaseRequired("'hello' comes first")
        if client.role not in roles:
            raise LeaseRequired(f"{op!r} is not for a client that is {client.role.value!r}")
        if lease is not None and lease.holder is client:
            lease.since = self._core.clock()
            if lease.broken is not None and op not in _AT_ONCE | _AFTER_LOSS:
                raise lease.broken
        self._core.custody.check(op)
        immediate = self._immediate.get(op)
        if immediate is not None:
            _succeed(client, *immediate(client, message))
        else:
            self._jobs[op](client, message)

    # --- answered at once ---

    def _hello(self, client: Client, message: ControlMessage) -> None:
        word = text(message.fields, "role", 16)
        if client.role is not None or word not in set(Role):
            raise BadRequest(f"'hello' names a role ({', '.join(Role)}), once")
        role = Role(word)
        name = session(message.fields) if message.fields.get("session") else ""
        if role is not Role.OBSERVER:
            if self._core.lease is not None:
                raise LeaseHeld(f"a client that is {self._core.lease.role.value!r} has the lease")
            self._core.lease = Lease(client, role, self._core.clock())
            self._core.log_state("lease-taken", role=role.value)
        client.role, client.session = role, name
        _succeed(client, *self._status(client, message))

    def _status(self, client: Client, message: ControlMessage) -> Outcome:
        return self._core.info().to_fields(), b"", ()

    def _memory(self, client: Client, message: ControlMessage) -> Outcome:
        start = integer(message.fields, "start", 0, 1 << 32)
        link = self._link()
        generation = link.memory.generation
        if message.fields.get("generation", generation) != generation:
            raise LayoutChanged
        flat = link.memory.flat()
        part = flat[start : start + MAX_DESCRIPTORS]
        descriptors: list[int] = []
        try:
            for region in part:
                descriptors.append(os.dup(region.descriptor))
        except OSError:
            close_fds(descriptors)
            raise
        fields: Fields = {
            "regions": [(r.iova, r.length, r.offset, r.writable) for r in part],
            "generation": generation,
            "total": len(flat),
        }
        return fields, b"", descriptors

    def _arm_recovery(self, client: Client, message: ControlMessage) -> Outcome:
        path = text(message.fields, "qmp_path", _PATH_CHARACTERS)
        deadline_s = number(message.fields, "deadline_s", 0.01, MAX_RECOVERY_S)
        lease = self._lease()
        lease.qmp_path, lease.recovery_deadline_s = path, deadline_s
        return {}, b"", ()

    def _disarm_recovery(self, client: Client, message: ControlMessage) -> Outcome:
        self._lease().qmp_path = ""
        return {}, b"", ()

    def _journal(self, client: Client, message: ControlMessage) -> Outcome:
        limit = integer(message.fields, "max_records", 0, 1 << 32)
        journal = self._link().journal
        records = journal.take(min(limit, MAX_JOURNAL_RECORDS))
        return {"overflow": journal.overflow}, records, ()

    def _release(self, client: Client, message: ControlMessage) -> Outcome:
        self._core.custody.release(_session(client, message))
        self._lease().released = True
        return self._changed("released")

    def _reclaim(self, client: Client, message: ControlMessage) -> Outcome:
        self._core.custody.reclaim(_session(client, message))
        self._lease().released = False
        return self._changed("reclaimed")

    def _own(self, client: Client, message: ControlMessage) -> Outcome:
        link = self._link()
        steps.parse_records(link, message.blob)
        first = not self._core.custody.owned
        self._core.custody.own(_session(client, message))
        if first:
            link.start_records = message.blob
            self._core.log_state("owned")
        return {}, b"", ()

    def _fence(self, client: Client, message: ControlMessage) -> Outcome:
        self._core.custody.fence(session(message.fields))
        self._core.log_state("fenced")
        return {}, b"", ()

    def _changed(self, event: str) -> Outcome:
        self._link().enter(self._core.custody.state)
        self._core.log_state(event)
        return {}, b"", ()

    # --- done by the device ---

    def _mediate(self, client: Client, message: ControlMessage) -> None:
        fields = message.fields
        tracker = text(fields, "tracker", 16)
        if tracker not in jobs.TRACKERS:
            raise BadRequest(f"'tracker' has to be one of {', '.join(jobs.TRACKERS)}")
        page_bytes = integer(fields, "page_size", 1, MAX_PAGE_BYTES)
        if page_bytes.bit_count() != 1:
            raise BadRequest("'page_size' has to be a power of two")
        job = jobs.mediate(
            self._link(),
            self._core.custody,
            tracker=tracker,
            page_bytes=page_bytes,
            capture=boolean(fields, "capture"),
            snapshot=message.blob,
        )

        def outcome(result: jobs.Mediated) -> Outcome:
            descriptors = [] if result.dirty_fd is None else [os.dup(result.dirty_fd)]
            reply: Fields = {
                "journal_seq": result.journal_seq,
                "page_size": result.page_bytes,
                "n_pages": result.n_pages,
                "half_bytes": result.half_bytes,
                "layout_generation": result.layout_generation,
            }
            return reply, result.values, descriptors

        self._run(client, job, outcome, held=True, event="mediated")

    def _dirty(self, client: Client, message: ControlMessage) -> None:
        link = self._link()

        def outcome(result: jobs.Collected) -> Outcome:
            fields: Fields = {
                "half": result.half,
                "complete": result.complete,
                "layout_generation": link.memory.generation,
            }
            return fields, b"", ()

        self._run(client, jobs.dirty(link), outcome, held=False)

    def _batch(self, client: Client, message: ControlMessage) -> None:
        job = jobs.batch(self._link(), message.blob)
        self._run(client, job, lambda records: ({}, records, ()), held=True)

    def _stop(self, client: Client, message: ControlMessage) -> None:
        fence = boolean(message.fields, "fence")
        job = jobs.stop(self._link(), self._core.custody, fence=fence, resume=message.blob)
        self._run(client, job, _nothing, held=True, event="stopped")

    def _mig_state(self, client: Client, message: ControlMessage) -> None:
        value = integer(message.fields, "state", 0, 7)
        if value not in set(MigrationState):
            raise BadRequest(f"migration state {value} does not exist in vfio-user")
        job = jobs.set_migration_state(self._link(), MigrationState(value))
        self._run(client, job, _nothing, held=False)

    def _mig_state_get(self, client: Client, message: ControlMessage) -> None:
        job = jobs.get_migration_state(self._link())
        self._run(client, job, lambda state: ({"state": int(state)}, b"", ()), held=False)

    def _mig_read(self, client: Client, message: ControlMessage) -> None:
        max_bytes = integer(message.fields, "max_bytes", 1, MAX_BLOB_BYTES)
        job = jobs.read_migration_data(self._link(), max_bytes)
        self._run(client, job, lambda data: ({}, data, ()), held=False)

    def _mig_write(self, client: Client, message: ControlMessage) -> None:
        job = jobs.write_migration_data(self._link(), message.blob)
        self._run(client, job, _nothing, held=False)

    def _reset_device(self, client: Client, message: ControlMessage) -> None:
        self._link()
        self._run(client, jobs.reset_device(), _nothing, held=False)

    def _passthrough(self, client: Client, message: ControlMessage) -> None:
        core = self._core
        if core.custody.state is State.PASSTHROUGH:
            _succeed(client, {})
            return
        job = jobs.restore(self._link(), core.custody)
        self._run(client, job, _nothing, held=True, event="restored")

    def _standby(self, client: Client, message: ControlMessage) -> None:
        job = jobs.standby(self._link(), self._core.custody, _session(client, message))
        self._run(client, job, _nothing, held=True, event="standby")

    def _start(self, client: Client, message: ControlMessage) -> None:
        job = jobs.start(self._link(), self._core.custody, message.blob)
        self._run(client, job, _nothing, held=True, event="started")

    def _abandon(self, client: Client, message: ControlMessage) -> None:
        if self._core.custody.state is State.PASSTHROUGH:
            _succeed(client, {})
            return
        job = jobs.abandon(self._link(), self._core.custody)
        self._run(client, job, _nothing, held=True, event="abandoned")

    def _run(
        self,
        client: Client,
        job: Job[T],
        outcome: Callable[[T], Outcome],
        *,
        held: bool,
        event: str = "",
    ) -> None:
        def done(result: T) -> None:
            if event:
                self._core.log_state(event)
            if not client.closed:
                self._guard(client, lambda: _succeed(client, *outcome(result)))

        def failed(error: SyncError) -> None:
            if not client.closed:
                _fail(client, error)

        self._core.run(job, done, failed, held=held)

    # --- what they share ---

    def _link(self) -> Link:
        link = self._core.link
        if link is None or not self._core.ready:
            raise NoDevice
        return link

    def _lease(self) -> Lease:
        lease = self._core.lease
        if lease is None:
            raise LeaseRequired
        return lease


def _session(client: Client, message: ControlMessage) -> str:
    name = session(message.fields)
    if client.session and name != client.session:
        raise WrongSession(f"this client came for session {client.session!r}, not {name!r}")
    return name


def _nothing(_: object) -> Outcome:
    return {}, b"", ()


def _succeed(
    client: Client, fields: Fields, blob: bytes = b"", descriptors: Sequence[int] = ()
) -> None:
    client.reply({"ok": True, **fields}, blob, descriptors)


def _fail(client: Client, error: SyncError) -> None:
    code = error.code if isinstance(error, GatewayError) else GatewayError.code
    client.reply({"ok": False, "error": code, "message": str(error)}, b"", ())
