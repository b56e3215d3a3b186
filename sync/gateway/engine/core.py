"""The gateway without its sockets: what comes and goes, who holds the lease, what happens next.

Sans-IO: the event loop reports connections and requests; the answers go back through what it gave.
Owned here: the lease, the queue of what waits for the device to be free, and what the gateway does
by itself when a device, a VMM or a lease is lost. Not owned: what a request means (`server`).
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sync.errors import SyncError
from sync.gateway.control.info import Activity, GatewayInfo, Recovery, Upgraded, VmmConnection
from sync.gateway.datapath.dma import AtDevice
from sync.gateway.datapath.journal import DEFAULT_RECORDS
from sync.gateway.datapath.peer import Handler
from sync.gateway.datapath.relay import Send, VmmCommand
from sync.gateway.engine import comeback, jobs
from sync.gateway.engine import device_steps as steps
from sync.gateway.engine.comeback import Successor
from sync.gateway.engine.custody import ClientRole, Custody, CustodyState, LeaseLoss
from sync.gateway.engine.device_handshake import DeviceFacts, handshake
from sync.gateway.engine.device_link import DeviceLink, LocalDevice
from sync.gateway.engine.inheritance import Inherited, furnish, own
from sync.gateway.engine.job_runner import Job
from sync.gateway.engine.records import Records
from sync.gateway.engine.replacement import Replacement
from sync.gateway.errors import (
    DeviceLost,
    GatewayError,
    GatewayLost,
    NewDeviceUnreachable,
    NoDevice,
    NoVmm,
    VmmLost,
    WrongState,
)
from sync.memory import PAGE_BYTES
from sync.registers.errors import RegisterError
from sync.registers.find import Origin
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
    away_hold_s: float = 4.0
    """How long an access waits for a device that has gone: a VMM gives it up after 5 s."""
    away_patience_s: float = 60.0
    """A device that is gone for longer is not waited for any more: an access is answered at once,
    with an error. The device may come back all the same."""
    comeback_step_s: float = 2.0
    """A device that comes back has to do each step within this time."""
    journal_records: int = DEFAULT_RECORDS


class Sockets(Protocol):
    """What the core has done with the sockets of devices."""

    def open_next(self, path: str, opened: Callable[[Send | SyncError], None]) -> None:
        """Connects to a new device; `opened` is told at once or later. Raises OSError,
        `SyncError`."""

    def hear_next(self, handler: Handler) -> None:
        """What the new device says goes to `handler`."""

    def adopt_next(self, path: str) -> None:
        """The new device is the guest's from here on, and found at `path`."""

    def drop_next(self) -> None:
        """Nothing comes of the new device."""

    def device_gone(self, reason: str) -> None:
        """The guest's device is lost."""


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


@dataclass(slots=True)
class _Waiting:
    """What waits for the device to be free; `due`: when `late` is called, if it is stuck."""

    call: Callable[[], None]
    late: Callable[[], None] | None
    due: float


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
        origins: Sequence[Origin] = (),
    ) -> None:
        self._origins = origins
        self.successor: Successor | None = None
        """A device that is to take the place of the one that is gone."""
        self.replacement: Replacement | None = None
        """The planned change to another device that is under way."""
        self.sockets: Sockets
        """Set by whoever has them."""
        self.relic = b""
        """The state stream from which the device's next process goes on, if there is one."""
        self.absence = ""
        """Why the device is not there, if it is waited for."""
        self._away_since = 0.0
        self.device_path = self.device_option = ""
        """As in a status; kept by whoever has the sockets."""
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
        self.hand_on: Callable[[Callable[[Upgraded | GatewayError], None]], None]
        """Has another process take this one's place, and is told of the outcome. Set by whoever
        has the sockets."""
        self._log = log
        self._recover = recover
        self._generation = 0
        self._orphaned = False
        self._waiting: deque[_Waiting] = deque()

    # --- device and VMM ---

    def device_came(
        self,
        to_device: Send,
        on_ready: Callable[[SyncError | None], None],
        local: LocalDevice | None = None,
    ) -> DeviceLink:
        """A device was connected, or is `local`; `on_ready` is called when it has been asked
        everything."""
        link = self.link = self._new_link(to_device, local)

        def done(result: object, error: SyncError | None) -> None:
            if error is None:
                link.adopt(local)
                self.facts = link.facts
                self.ready = True
                self._orphaned = False
            on_ready(error)
            self._proceed()

        link.runner.start(self._meet(link), done, held=False)
        return link

    def _meet(self, link: DeviceLink) -> Job[None]:
        patience_s = 0.0 if link.local is None else link.local.patience_s
        yield from handshake(link.facts, orphaned=self._orphaned, patience_s=patience_s)
        if link.facts.running:
            try:
                keeper = yield from comeback.see(link, self._origins)
            except RegisterError as error:
                self.log_state("device-not-kept", reason=str(error))
            else:
                if keeper is not None:
                    link.keep(keeper)

    def adopt(self, heir: Inherited, to_device: Send, to_twin: Send, to_vmm: Send | None) -> None:
        """Stands where another process stood. Raises `DmaFault`, OSError."""
        state = heir.state
        own(self.custody, state.ownership)
        self.vmm, self.last_recovery = state.vmm, state.last_recovery
        self._orphaned, self._generation = state.orphaned, state.generation
        if state.link is None:
            return
        link = self._new_link(to_device)
        link.relay.to_vmm = to_vmm
        furnish(link, state.link, self.custody, heir, to_twin, self._origins)
        self.link, self.facts, self.ready = link, link.facts, True
        if link.migration_touched and not self.custody.shut:
            self._wake_on_access(link)

    @property
    def orphaned(self) -> bool:
        """Whether the device may still work for a VMM that is gone."""
        return self._orphaned

    @property
    def generation(self) -> int:
        """Of the memory map."""
        return self.link.memory.generation if self.link is not None else self._generation

    def _new_link(self, to_device: Send, local: LocalDevice | None = None) -> DeviceLink:
        link = DeviceLink(
            to_device,
            self.clock,
            deadline_s=self.limits.device_deadline_s,
            journal_records=self.limits.journal_records,
            generation=self._generation + 1,
            local=local,
        )
        link.runner.on_late_end = self._proceed
        link.relay.on_defect = self._defect
        return link

    def why_not_hand_on(self) -> str:
        """What keeps another process from taking this one's place, or ''."""
        custody, link = self.custody, self.link
        if self.lease is not None:
            return "a migration is under way"
        if custody.state not in (CustodyState.PASSTHROUGH, CustodyState.RELEASED):
            return (
                f"it is {custody.state.value!r} for session {custody.session}: `resolve` it first"
            )
        if self.absence or self.successor is not None:
            return "its device is gone: try again when it is back"
        if self.replacement is not None:
            return "its device is being replaced"
        if link is not None and link.interrupts.watched:
            return "a guest has just come, and its device is watched: try again in a minute"
        return ""

    def device_lost(self, reason: str) -> None:
        self._lost(DeviceLost(f"the device is gone: {reason}"))

    def device_gone(self, reason: str, relic: bytes = b"") -> bool:
        """The device's connection has ended. `relic`: the state stream from which its next process
        can go on. True: the VMM's goes on, and the device is waited for;
        `successor_came` is told when it is there again. False: nothing is done (`device_lost`)."""
        if self.replacement is not None:
            if self.replacement.moving:
                self.replacement.device_gone(reason)
                return True
            self.replacement.abandon(DeviceLost(f"the guest's device is gone: {reason}"))
        link = self.link
        known = link is not None and (link.keeper is not None or bool(relic))
        if link is None or not known or not self.ready or not self.custody.keeps_guest:
            return False
        error = DeviceLost(f"the device is gone: {reason}")
        self.ready = False
        self.absence = reason
        self._away_since = self.clock()
        self.relic = relic
        if self.lease is not None:
            self.lease.broken = error
        self.custody.device_away()
        link.lose_device(self.limits.away_hold_s, self.limits.away_patience_s)
        link.runner.abort(error)
        self.log_state("device-away", reason=reason)
        self._proceed()
        return True

    def successor_came(
        self,
        to_device: Send,
        on_end: Callable[[SyncError | None], None],
        local: LocalDevice | None = None,
    ) -> Successor:
        """A device was connected in the place of the one that is gone; `on_end` is called when it
        has taken that place, or why it cannot."""
        link = self.link
        assert link is not None and self.successor is None
        successor = Successor(link, to_device, self.clock, self.limits.comeback_step_s)
        self.successor = successor

        def done(known: object, error: SyncError | None) -> None:
            self.successor = None
            if error is None:
                self._regained(link, successor, to_device, known is True)
            else:
                successor.close()
                for region in link.memory.regions:
                    region.at_device = AtDevice.NOT
                if str(error) != self.absence:
                    self.absence = str(error)
                    self.log_state("device-not-back", reason=self.absence)
            on_end(error)
            self._proceed()

        if self.relic:
            patience_s = local.patience_s if local else 0.0
            job = comeback.go_on(link, successor.facts, self.relic, patience_s)
        else:
            job = comeback.come_back(link, successor.facts)
        successor.runner.start(job, done, held=False)
        return successor

    def _regained(
        self, link: DeviceLink, successor: Successor, to_device: Send, known: bool
    ) -> None:
        link.comebacks += 1
        self.facts = successor.facts
        self.ready = True
        self.absence = ""
        refused = link.away.refused if link.away else 0
        link.regain_device(to_device, successor.facts)
        link.interrupts.fire_all()
        self.log_state(
            "device-back",
            away_ms=round((self.clock() - self._away_since) * 1000),
            refused=refused,
            work_known=known,
        )

    # --- a planned change to another device ---

    def prepare_replacement(self, path: str, done: Callable[[SyncError | None], None]) -> None:
        """Connects to the device at `path` and has it ready; the guest's works on.

        Raises `NoDevice`, `NoVmm`, `Unsupported`, `WrongState`, `NewDeviceUnreachable`.
        """
        link = self.link
        if link is None or not self.ready:
            raise NoDevice
        if not self.custody.vmm_connected:
            raise NoVmm("no VMM is connected: end the device and start the new one in its place")
        if self.replacement is not None:
            raise WrongState("the device is being replaced")
        comeback.check_replaceable(link)
        lease = self.lease

        def opened(to_device: Send | SyncError) -> None:
            if isinstance(to_device, SyncError):
                done(NewDeviceUnreachable(f"no new device at {path}: {to_device}"))
            elif link is not self.link or not self.ready or lease is not self.lease:
                self.sockets.drop_next()
                done(DeviceLost("the guest's device, or who wanted another one, has gone"))
            else:
                self._prepare(link, path, to_device, done)

        try:
            self.sockets.open_next(path, opened)
        except (OSError, SyncError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise NewDeviceUnreachable(f"no new device at {path}: {reason}") from error

    def _prepare(
        self,
        link: DeviceLink,
        path: str,
        to_device: Send,
        done: Callable[[SyncError | None], None],
    ) -> None:
        successor = Successor(link, to_device, self.clock, self.limits.comeback_step_s)
        self.sockets.hear_next(successor.relay.from_device)
        self.replacement = Replacement(
            link,
            successor,
            path,
            self.clock,
            self.limits.away_hold_s,
            swap=lambda: self._swap(link, successor, to_device, path),
            drop=self._drop_replacement,
        )
        self.log_state("replacing", path=path)
        self.replacement.prepare(done)

    def switch_device(self, done: Callable[[Replacement, SyncError | None], None]) -> None:
        """Has the prepared device take the place of the guest's, with its accesses held back."""
        replacement = self.replacement
        if replacement is None:
            raise WrongState("no new device is ready: it has gone, or was not prepared")

        def ended(error: SyncError | None) -> None:
            self.replacement = None
            if error is not None:
                self.log_state("device-not-replaced", reason=str(error))
            done(replacement, error)
            if error is not None and replacement.old_gone:
                self.sockets.device_gone(replacement.old_gone)
            self._proceed()

        replacement.switch(ended)

    def _swap(self, link: DeviceLink, successor: Successor, to_device: Send, path: str) -> None:
        link.relay.lose_device()
        link.relay.to_device = to_device
        link.facts = self.facts = successor.facts
        self.sockets.adopt_next(path)
        link.enter(self.custody.state, shut=self.custody.shut)
        link.interrupts.fire_all()
        self.log_state("device-replaced", path=path)

    def _drop_replacement(self) -> None:
        self.replacement = None
        self.sockets.drop_next()

    def look(self) -> bool:
        """Follows what is under way in the device; whether it is to be done again soon."""
        keeper = self.link.keeper if self.link is not None else None
        if keeper is None or not keeper.armed or not self.ready:
            return False
        keeper.look()
        return keeper.armed

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
                link.relay.vmm_commands = link.commands
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
            **link.commands,
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
        if self.successor is not None:
            self.successor.runner.abort(error)
        replacement = self.replacement
        if replacement is not None:
            replacement.abandon(error)
            replacement.successor_gone(error.message)
        link, self.link = self.link, None
        self.absence = ""
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
        if self.replacement is not None and self.replacement.moving:
            return True
        return self.link is not None and self.link.runner.busy

    @property
    def stuck(self) -> bool:
        """Whether the device is at something that nobody waits for any more."""
        return self.link is not None and self.link.runner.overdue

    def when_idle(self, call: Callable[[], None], late: Callable[[], None] | None = None) -> None:
        """Calls now, or as soon as the device is free, in the order of asking; `late` instead, if
        the device is stuck and still is when it has been waited for long enough."""
        self._waiting.append(_Waiting(call, late, self.clock() + self.limits.device_deadline_s))
        self._proceed()

    def _proceed(self) -> None:
        while self._waiting and not self.busy:
            waiting = self._waiting.popleft()
            try:
                waiting.call()
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
        if self.successor is not None:
            self.successor.runner.expire(now)
        if self.replacement is not None:
            self.replacement.expire(now)
        if self.stuck:
            for waiting in [each for each in self._waiting if now > each.due]:
                if waiting.late is not None:
                    self._waiting.remove(waiting)
                    waiting.late()
        link = self.link
        if link is None:
            return
        link.runner.expire(now)
        if link.away is not None:
            link.away.expire(now)
            return
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
        for waiting in self._waiting:
            waiting.due += seconds

    # --- the lease ---

    def lease_lost(self, holder: Holder) -> None:
        """A control connection has ended. If it held the lease, its session is cleaned up."""
        lease = self.lease
        if lease is None or lease.holder is not holder:
            return
        if self.replacement is not None:
            self.replacement.abandon(GatewayLost("nobody waits for the new device any more"))
        if self.custody.on_lease_loss(lease.role) is LeaseLoss.ABANDON:
            # At once, whatever the device is doing: this session must not come to own the guest.
            self.custody.fence(self.custody.session)
        if self.stuck:
            # The guest does not wait for a device that may never answer.
            self._bring_back(lease)
        self.when_idle(lambda: self._clean_up(lease))

    def silent_holder(self, now: float) -> Holder | None:
        """The holder that keeps a stopped guest waiting without asking for anything."""
        lease = self.lease
        if lease is None or lease.role is not ClientRole.SOURCE:
            return None
        if self.busy and not self.stuck:
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
            device_absence=self.absence,
            device_path=self.device_path,
            device_option=self.device_option,
            comebacks=link.comebacks if link else 0,
            vmm_connected=custody.vmm_connected,
            vmm=self.vmm,
            lease=self.lease.role if self.lease else None,
            regions=facts.regions,
            irqs=facts.irqs,
            config_space=facts.config_space,
            identity=facts.identity,
            supports=facts.supports,
            holds=facts.holds,
            pin_ns_per_page=link.local.pin_ns_per_page if link and link.local else 0.0,
            layout_generation=self.generation,
            memory_pages=sum(
                region.request.size // PAGE_BYTES
                for region in regions
                if region.descriptor is not None
            ),
            dropped_writes=link.gate.dropped if link else 0,
            journal_records=link.journal.n_records if link else 0,
            journal_overflow=link.journal.overflow if link else False,
            activity=Activity(
                link.watch.writes,
                link.watch.refused,
                link.interrupts.arrived,
                link.interrupts.n_tapped,
            )
            if link
            else Activity(),
            last_recovery=self.last_recovery,
        )
