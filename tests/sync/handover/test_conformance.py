"""The gateways of the exploration's world are as real ones are, step by step.

`test_exploration` proves what holds in a world whose gateways are modelled. Here every step that a
modelled gateway takes in any of its states is taken by a real `Custody` with a device behind it,
and every death of a controller is told to a real `Core`: both must come out equal.
"""

from collections.abc import Iterator
from contextlib import suppress

import pytest

from sync.errors import SyncError
from sync.gateway.control.requests import Mediate
from sync.gateway.engine import jobs
from sync.gateway.engine.core import Armed, Core, Lease, Limits
from sync.gateway.engine.custody import ClientRole, CustodyState
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.job_runner import Job
from sync.gateway.engine.records import Fate
from sync.gateway.errors import SessionFenced, WrongState
from sync.handover.machine import Action, Event, HandoverError
from sync.handover.states import HandoverState, Role
from sync.vfio_user.protocol import HEADER, Version
from tests.sync.gateway.model_device import ModelDevice
from tests.sync.handover.test_exploration import Model, Side, Violation, execute, explore

SESSION = "s"
QMP = "/run/vmm.qmp"


class Controller:
    """Who holds the lease."""

    closed = False


class Gateway:
    """A real one, without sockets; its device answers at once."""

    def __init__(self, role: Role) -> None:
        self.resumed_vmm = False
        self._role = role
        self._device = ModelDevice()
        self._to_device: list[bytes] = []
        self._controller = Controller()
        self.core = Core(Limits(), lambda: 0.0, lambda *_, **__: None, self._resume_vmm)
        self.core.device_came(lambda data, _: self._to_device.append(bytes(data)), lambda _: None)
        self._settle()
        self.core.vmm_came(lambda *_: None, Version())
        self._lease = Lease(self._controller, ClientRole(role.value), 0.0, recovery=Armed(QMP, 1.0))
        self.core.lease = self._lease

    @property
    def record(self) -> str:
        """In the model's words."""
        fate = self.core.custody.records.fate(SESSION)
        if self._role is Role.SOURCE:
            return fate.value if fate in (Fate.RELEASED, Fate.MOVED) else "owned"
        if fate in (None, Fate.STANDBY):
            return "none"
        return "run" if fate is Fate.ABOUT_TO_RUN else str(fate)

    def bring_to(self, record: str, state: CustodyState) -> None:
        """From the start: a guest that runs here (source), or a VMM that waits (target)."""
        custody = self.core.custody
        if self._role is Role.SOURCE:
            if state is not CustodyState.PASSTHROUGH:
                request = Mediate(tracker="none", page_size=4096, capture=True)
                self._run(jobs.mediate(self._link, custody, request, SESSION))
            if state in (CustodyState.STOPPED, CustodyState.RELEASED):
                self._run(jobs.stop(self._link, custody, fence=True, resume=b""))
            if record in ("released", "moved"):
                self.execute(Action.RELEASE)
            if record == "moved":
                self.execute(Action.NOTE_MOVED)
        elif (record, state) != ("none", CustodyState.PASSTHROUGH):
            self._run(jobs.standby(self._link, custody, SESSION))
            if record in ("owned", "run"):
                self.execute(Action.OWN)
            if record == "fenced":
                self.execute(Action.FENCE)
            if state is CustodyState.PASSTHROUGH:
                leave = jobs.start(self._link, custody, b"")
                self._run(leave if record == "run" else jobs.abandon(self._link, custody))
        assert (self.record, custody.state) == (record, state)

    def execute(self, command: Action) -> Event:
        """As the commands of both sides have it done."""
        custody = self.core.custody
        if command is Action.RELEASE:
            custody.release(SESSION)
            self._lease.released = True
            return Event.RELEASED
        if command is Action.NOTE_MOVED:
            custody.moved(SESSION)
            return Event.RELEASED
        if command is Action.RESTORE:
            if custody.state is CustodyState.RELEASED:
                custody.reclaim(SESSION)
                self._lease.released = False
            self._run(jobs.restore(self._link, custody))
            return Event.RESTORED
        if command is Action.OWN:
            try:
                custody.own(SESSION)
            except SessionFenced:
                return Event.FAILED
            return Event.OWNED
        if command is Action.START_GUEST:
            if not custody.owned:
                return Event.FAILED
            self._run(jobs.start(self._link, custody, b""))
            return Event.STARTED
        assert command is Action.FENCE
        try:
            custody.fence(SESSION)
        except WrongState:
            return Event.MAY_HAVE_RUN
        return Event.FENCED

    def controller_dies(self) -> None:
        self._controller.closed = True
        self.core.lease_lost(self._controller)
        self._settle()

    @property
    def _link(self) -> DeviceLink:
        assert self.core.link is not None
        return self.core.link

    def _run(self, job: Job[object]) -> None:
        errors: list[SyncError] = []
        self.core.run(job, lambda _: None, errors.append, held=True)
        self._settle()
        assert not errors

    def _settle(self) -> None:
        while self._to_device:
            reply = self._device.execute(self._to_device.pop(0), 0)
            number, command, _, flags, error = HEADER.unpack_from(reply)
            errno = error if flags & 0x20 else 0
            message = memoryview(bytearray(reply))
            self._link.relay.from_device(number, command, flags, errno, message, [])

    def _resume_vmm(self, armed: Armed, session: str, proof: str) -> None:
        assert armed.qmp_path == QMP
        self.resumed_vmm = True


def sides() -> Iterator[tuple[Role, Side]]:
    """Every side that the exploration meets, as its gateway sees it. None if the handover is
    broken, which the exploration's own tests tell."""
    with suppress(Violation, HandoverError):
        for world in explore(faults=True):
            yield Role.SOURCE, world.source
            if world.target.vmm:
                yield Role.TARGET, world.target


SIDES = list(sides())
STEPS = sorted(
    {(role, side.queue[0], side.record) for role, side in SIDES if side.queue}
    # The model knows this one, too, but no run comes to it.
    | {(Role.TARGET, Action.OWN, "fenced")},
    key=repr,
)
DEATHS = sorted(
    {(role, side.record, side.guest, side.queue) for role, side in SIDES if side.alive}, key=repr
)


def states_of(role: Role, record: str, guest: str, first: Action | None) -> list[CustodyState]:
    """The states of a real gateway that the model does not tell apart."""
    if role is Role.TARGET:
        if guest == "runs" or record == "run":
            return [CustodyState.PASSTHROUGH]
        anywhere = (None, Action.FENCE)
        if (first in anywhere and record == "fenced") or (first, record) == (Action.FENCE, "none"):
            return [CustodyState.STANDBY, CustodyState.PASSTHROUGH]
        return [CustodyState.STANDBY]
    if record in ("released", "moved"):
        return [CustodyState.RELEASED]
    if first is Action.RELEASE:
        return [CustodyState.STOPPED]
    return [CustodyState.PASSTHROUGH, CustodyState.MEDIATED, CustodyState.STOPPED]


@pytest.mark.parametrize(
    ("role", "command", "record", "state"),
    [
        (role, command, record, state)
        for role, command, record in STEPS
        for state in states_of(role, record, "-", command)
    ],
    ids=lambda value: value if isinstance(value, str) else value.name.lower(),
)
def test_i7_a_command_does_what_it_does_in_the_model(
    role: Role, command: Action, record: str, state: CustodyState
) -> None:
    gateway = Gateway(role)
    gateway.bring_to(record, state)
    modelled, event = execute(command, Side(HandoverState.IDLE, record=record))
    assert gateway.execute(command) is event
    assert gateway.record == modelled.record
    assert not gateway.resumed_vmm


@pytest.mark.parametrize(
    ("role", "record", "guest", "queue", "state"),
    [
        (role, record, guest, queue, state)
        for role, record, guest, queue in DEATHS
        for state in states_of(role, record, guest, queue[0] if queue else None)
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else "+".join(command.name.lower() for command in value) or "nothing"
        if isinstance(value, tuple)
        else value.name.lower()
    ),
)
def test_i7_i8_a_death_leaves_what_it_leaves_in_the_model(
    role: Role, record: str, guest: str, queue: tuple[Action, ...], state: CustodyState
) -> None:
    """The commands that the dead controller has sent are executed before its end is seen."""
    gateway = Gateway(role)
    gateway.bring_to(record, state)
    modelled = Model.dead(Side(HandoverState.IDLE, record=record, guest=guest, queue=queue))
    for command in queue:
        gateway.execute(command)
    gateway.controller_dies()
    assert gateway.record == modelled.record
    if role is Role.SOURCE:
        assert gateway.resumed_vmm == (modelled.guest == "runs")
    else:
        assert not gateway.resumed_vmm
    if modelled.guest == "runs":
        assert gateway.core.custody.state is CustodyState.PASSTHROUGH
