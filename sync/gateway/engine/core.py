"""The gateway without its sockets: what comes and goes, who holds the lease, what happens next.

Sans-IO: the event loop reports connections and requests; the answers go back through what it gave.
Owned here: the lease, the queue of what waits for the device to be free, and what the gateway does
by itself when a device, a VMM or a lease is lost. Not owned: what a request means (`server`).
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sync.errors import SyncError
from sync.gateway.control.info import Activity, GatewayInfo, Recovery, VmmConnection
from sync.gateway.datapath.journal import DEFAULT_RECORDS
from sync.gateway.datapath.relay import Send, VmmCommand
from sync.gateway.engine import device_steps as steps
from sync.gateway.engine import jobs
from sync.gateway.engine.custody import ClientRole, Custody, CustodyState, LeaseLoss
from sync.gateway.engine.device_handshake import DeviceFacts, handshake
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.job_runner import Job
from sync.gateway.engine.records import Records
from sync.gateway.errors import DeviceLost, GatewayError, VmmLost
from sync.memory import PAGE_BYTES
from sync.vfio_user.protocol import Command, Version

T = TypeVar("T")

WATCH_S = 30.0
"""For how long it is counted, at most, what a guest that has come asks and its device does."""
MAX_SESSIONS_TOLD = 16
"""So many are in a status, the latest; any other is told of when it is asked for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the waiting."""

    device_deadline_s: float = 5.0
    """A job for which the device takes longer than this has failed."""
    lease_silence_s: float = 120.0
    """With the guest stopped, a controller that asks for nothing as long as this has failed."""
    device_wait_s: float = 10.0
    """How long a VMM that has connected waits for the device."""
    journal_records: int = DEFAULT_RECORDS


class Holder(Protocol):
    """What the core knows of a control connection."""

    @property
    def closed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Armed:
    """How a VMM is had to run again: its QMP socket, within how many seconds, and the control
    sockets of its other gateways, which come first: a guest must not meet a device that is shut."""

    qmp_path: str
    deadline_s: float
    ran: bool = True
    put_back: str = ""
    silence_s: float = math.inf
    """A controller that asks for nothing as long as this, with its device mediated or stopped, has
    failed."""
    may_end_holder: bool = False
    """Its process may be ended if it hangs and keeps the VMM from being reached."""
    companions: tuple[str, ...] = ()
    qmp_made: tuple[int, int, int] | None = None
    """The QMP socket's file (`recover.socket_made`): another one is another VMM's."""


@dataclass(slots=True)
class Lease:
    """The right of one controller to change things."""

    holder: Holder
    role: ClientRole
    since: float
    """When it last asked for something."""
    broken: GatewayError | None = None
    """Why the session that it stands for has ended; nothing else is done for it."""
    released: bool = False
    """Whether the guest was released under it and not reclaimed: then no VMM is resumed (I7)."""
    recovery: Armed | None = None
    """How its VMM is resumed should it end before the release; only one gateway of a VM has it."""


class Core:
    """`log` takes an event and its fields; `recover` starts bringing a VMM back, with the session
    and the proof that its guest is kept here."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float],
        log: Callable[..., None],
        recover: Callable[[Armed, str, str], None],
        records: Records | None = None,
    ) -> None:
        self.limits = limits
        self.clock = clock
        self.custody = Custody(records)
        self.link: DeviceLink | None = None
        self.ready = False
        """Whether the device is connected and has been asked everything."""
        self.facts = DeviceFacts()
        self.lease: Lease | None = None
        self.last_recovery: Recovery | None = None
        self.vmm = VmmConnection()
        """Kept by whoever has the sockets."""
        self._log = log
        self._recover = recover
        self._generation = 0
        self._orphaned = False
        self._waiting: deque[Callable[[], None]] = deque()

    # --- device and VMM ---

    def device_came(
        self,
        to_device: Send,
        on_ready: Callable[[SyncError | None], None],
        patience_s: float = 0.0,
    ) -> DeviceLink:
        """A device was connected; `on_ready` is called when it has been asked everything, for which
        it has `patience_s` longer than others."""
        link = DeviceLink(
            to_device,
            self.clock,
            deadline_s=self.limits.device_deadline_s,
            journal_records=self.limits.journal_records,
            generation=self._generation + 1,
        )
        link.runner.on_late_end = self._proceed
        link.relay.on_defect = self._defect
        self.link = link

        def done(result: object, error: SyncError | None) -> None:
            if error is None:
                self.facts = link.facts
                self.ready = True
                self._orphaned = False
            on_ready(error)
            self._proceed()

        job = handshake(link.facts, orphaned=self._orphaned, patience_s=patience_s)
        link.runner.start(job, done, held=False)
        return link

    def device_lost(self, reason: str) -> None:
        self._lost(DeviceLost(f"the device is gone: {reason}"))

    def vmm_came(self, to_vmm: Send, offer: Version) -> Version:
        """A VMM has made its offer (the device is ready); returns the answer to it."""
        assert self.link is not None
        answer = self.link.attach_vmm(to_vmm, offer)
        self.custody.vmm_came()
        self.log_state("vmm-connected")
        if self.custody.shut:
            self.link.migration_touched = not self.link.facts.running
            self.link.enter(self.custody.state, shut=True, vmm_starts=True)
        elif not self.link.facts.running:
            self._wake_on_access(self.link)
        return answer

    def _wake_on_access(self, link: DeviceLink) -> None:
        """A migration that ended with its gateway has left the device stopped: it is set running
        with the first register access, for by then the VMM has shared its memory again."""
        link.migration_touched = True

        def trap(command: int) -> VmmCommand:
            def first_access(
                message_id: int, flags: int, message: memoryview, descriptors: list[int]
            ) -> None:
                link.relay.vmm_commands = link.snoops.commands
                self.when_idle(lambda: self._wake(link))
                link.relay.from_vmm(message_id, command, flags, 0, message, descriptors)

            return first_access

        accesses = (
            Command.REGION_READ,
            Command.REGION_WRITE,
            Command.REGION_WRITE_MULTI,
            Command.DEVICE_RESET,
        )
        link.relay.vmm_commands = {
            **link.snoops.commands,
            **{command: trap(command) for command in accesses},
        }

    def _wake(self, link: DeviceLink) -> None:
        if link is not self.link or self.custody.state is not CustodyState.PASSTHROUGH:
            return

        def done(problem: SyncError | None) -> None:
            self.log_state("device-woken", reason=str(problem or ""))
            link.interrupts.fire_all()

        self.run(
            steps.run(link),
            done,
            lambda error: self.log_state("device-not-woken", reason=str(error)),
            held=True,
        )

    def vmm_lost(self, reason: str) -> None:
        self._orphaned = True
        self._lost(VmmLost(f"the VMM is gone: {reason}"))

    def _lost(self, error: GatewayError) -> None:
        """Either side has gone: the other goes with it, and so does the session."""
        link, self.link = self.link, None
        was_ready, self.ready = self.ready, False
        if self.lease is not None:
            self.lease.broken = error
        self.custody.lost()
        if link is not None:
            self._generation = link.memory.generation
            link.runner.abort(error)
            link.close()
        if was_ready:
            self.log_state(error.code, reason=error.message)
        self._proceed()

    # --- jobs, one after the other ---

    @property
    def busy(self) -> bool:
        return self.link is not None and self.link.runner.busy

    def when_idle(self, call: Callable[[], None]) -> None:
        """Calls now, or as soon as the device is free, in the order of asking."""
        self._waiting.append(call)
        self._proceed()

    def _proceed(self) -> None:
        while self._waiting and not self.busy:
            call = self._waiting.popleft()
            try:
                call()
            except Exception as error:
                self._defect(error)

    def _defect(self, error: Exception) -> None:
        """What was met while one message or one request was worked on, which is all it costs."""
        self._log("defect", reason=f"{type(error).__name__}: {error}")

    def run(
        self,
        job: Job[T],
        done: Callable[[T], None],
        failed: Callable[[SyncError], None],
        held: bool,
    ) -> None:
        """Runs a job at the device, which has to be free; then `done` or `failed` is called."""
        assert self.link is not None

        def finished(result: Any, error: SyncError | None) -> None:
            if self.lease is not None:
                self.lease.since = self.clock()
            if error is None:
                done(result)
            else:
                failed(error)
            self._proceed()

        self.link.runner.start(job, finished, held=held)

    def expire(self, now: float) -> None:
        """Ends what the device has taken too long for, and the watch over one that is known to
        work, or has been watched for long enough."""
        link = self.link
        if link is None:
            return
        link.runner.expire(now)
        known = link.interrupts.arrived or now > link.watched_since + WATCH_S
        if link.interrupts.tapping and self.custody.state is not CustodyState.STANDBY and known:
            link.interrupts.tapping = False
            self.when_idle(lambda: self._end_watch(link))

    def _end_watch(self, link: DeviceLink) -> None:
        if link is not self.link or self.custody.state is CustodyState.STANDBY:
            return

        def failed(error: SyncError) -> None:
            self.log_state("interrupts-not-direct", reason=str(error))

        self.run(jobs.end_watch(link, self.custody), lambda _: None, failed, held=False)

    def forgive(self, seconds: float) -> None:
        """The gateway itself stood still for so long: nobody else is blamed for it."""
        if self.link is not None:
            self.link.runner.forgive(seconds)
        if self.lease is not None:
            self.lease.since += seconds

    # --- the lease ---

    def lease_lost(self, holder: Holder) -> None:
        """A control connection has ended. If it held the lease, its session is cleaned up."""
        lease = self.lease
        if lease is None or lease.holder is not holder:
            return
        if self.custody.on_lease_loss(lease.role) is LeaseLoss.ABANDON:
            # At once, whatever the device is doing: this session must not come to own the guest.
            self.custody.fence(self.custody.session)
        if self.link is not None and self.link.runner.overdue:
            # The guest does not wait for a device that may never answer.
            self._bring_back(lease)
        self.when_idle(lambda: self._clean_up(lease))

    def silent_holder(self, now: float) -> Holder | None:
        """The holder that keeps a stopped guest waiting without asking for anything."""
        lease = self.lease
        if lease is None or lease.role is not ClientRole.SOURCE:
            return None
        if self.link is not None and self.busy and not self.link.runner.overdue:
            return None
        stopped = self.custody.on_lease_loss(lease.role) is LeaseLoss.RESTORE
        limit_s = self.limits.lease_silence_s
        if lease.recovery is not None:
            limit_s = min(limit_s, lease.recovery.silence_s)
        late = now - lease.since > limit_s
        return lease.holder if stopped and late else None

    def _clean_up(self, lease: Lease) -> None:
        action = self.custody.on_lease_loss(lease.role)
        self.log_state("lease-lost", role=lease.role.value, action=action.value)
        if action is LeaseLoss.NOTHING:
            self.lease = None
        elif action is LeaseLoss.RESUME or self.link is None:
            self._resume_vmm(lease)
        else:
            job = jobs.restore if action is LeaseLoss.RESTORE else jobs.abandon
            self.run(
                job(self.link, self.custody),
                lambda _: self._cleaned_up(lease, action),
                lambda error: self._cleaned_up(lease, action, str(error)),
                held=True,
            )

    def _cleaned_up(self, lease: Lease, action: LeaseLoss, trouble: str = "") -> None:
        if action is LeaseLoss.RESTORE:
            self.log_state("restored", reason=trouble)
            self._resume_vmm(lease)
        else:
            self.log_state("abandoned", reason=trouble)
            self.lease = None

    def _resume_vmm(self, lease: Lease) -> None:
        """Has the VMM run again if that was armed, unless it may run elsewhere by now (I7).

        What the ownership record says at this time does not count: a VMM that has connected anew,
        after a device was lost, is its own owner again even if its guest was released before.
        """
        self.lease = None
        self._bring_back(lease)

    def _bring_back(self, lease: Lease) -> None:
        armed = lease.recovery
        if armed is None or lease.released or not armed.qmp_path:
            return
        session = self.custody.session
        record = self.custody.records.find(session)
        self.log_state("recovering", qmp_path=armed.qmp_path)
        self._recover(armed, session, record.proof if record else "")
        lease.recovery = None

    def recovered(self, outcome: Recovery) -> None:
        self.last_recovery = outcome
        self.log_state("recovered", ok=outcome.ok, reason=outcome.message)

    # --- telling ---

    def log_state(self, event: str, **fields: object) -> None:
        self._log(
            event,
            state=self.custody.state.value,
            owner=self.custody.owner.value,
            session=self.custody.session,
            **fields,
        )

    def info(self) -> GatewayInfo:
        link = self.link
        custody = self.custody
        facts = self.facts
        regions = link.memory.regions if link else []
        return GatewayInfo(
            state=custody.state,
            owner=custody.owner,
            session=custody.session,
            sessions={
                record.session: record.fate for record in custody.records.latest(MAX_SESSIONS_TOLD)
            },
            device_connected=self.ready,
            vmm_connected=custody.vmm_connected,
            vmm=self.vmm,
            lease=self.lease.role if self.lease else None,
            regions=facts.regions,
            irqs=facts.irqs,
            config_space=facts.config_space,
            identity=facts.identity,
            supports=facts.supports,
            layout_generation=link.memory.generation if link else self._generation,
            memory_pages=sum(
                region.request.size // PAGE_BYTES
                for region in regions
                if region.descriptor is not None
            ),
            dropped_writes=link.gate.dropped if link else 0,
            journal_records=link.journal.n_records if link else 0,
            journal_overflow=link.journal.overflow if link else False,
            activity=Activity(link.watch.writes, link.watch.refused, link.interrupts.arrived)
            if link
            else Activity(),
            last_recovery=self.last_recovery,
        )
