"""Re-creates a controller's queues at another controller and walks them to where they stood.

A controller begins every ring at 0 and has no register to say otherwise. So it is first shown
scratch memory at the IOVAs of the rings; harmless commands are submitted until each ring stands
where the guest's does; then guest memory takes the place of the scratch memory:

    reset -> enable -> features -> completion queues -> for each of these its submission queues,
    with as many commands as `positions` says -> admin commands until the admin rings stand, too

Event requests take a slot and give no completion. They are given to the controller last, out of the
slots in front of the guest's tail, which it has consumed and does not read again: in scratch memory
an event could be lost, since nobody knows when the controller has taken them. So is what a
controller that has died did not complete.

Commands of a walk succeed, so that they leave nothing in the error log: Identify, and a read of one
block, or a flush where blocks do not fit.
"""

from dataclasses import replace

from sync.queues.errors import CannotMove, WalkFailed
from sync.queues.interface import (
    PAGE_BYTES,
    AwaitRegister,
    Plan,
    ResetFunction,
    Signal,
    Walk,
    WriteMemory,
    WriteRegister,
    le,
)
from sync.queues.nvme import positions
from sync.queues.nvme.inventory import Inventory
from sync.queues.nvme.positions import MAX_COMMANDS, Ring, Way
from sync.queues.nvme.rings import Rings
from sync.queues.nvme.specification import (
    CC_ENABLE,
    CSTS_READY,
    SQE_BYTES,
    Admin,
    Cns,
    Fid,
    Io,
    Reg,
    Sqe,
    doorbell_stride,
)
from sync.queues.nvme.state import CompletionQueue, ControllerState, SubmissionQueue
from sync.queues.scratch import Scratch

_TEMPORARY_ENTRIES = 64
_SAVE = 1 << 31
"""Of Set Features: write the value to the medium. It is there already."""
_INTERRUPTS_ENABLED = 2
"""CDW11.IEN of a created completion queue."""


class NvmeWalk(Walk):
    """One controller's walk; `inventory` is its own."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._rings = Rings(doorbell_stride(inventory.cap))
        self._configuration: object = None
        self._scratch = Scratch()
        self._data = 0
        """IOVA of the page for data; the page behind it is for a temporary ring."""
        self._page_bytes = PAGE_BYTES
        self._sqs: dict[int, SubmissionQueue] = {}
        self._cqs: dict[int, CompletionQueue] = {}

    def ahead(self, state: bytes) -> Plan[None]:
        yield from self._to(ControllerState.unpack(state))

    def finish(self, state: bytes) -> Plan[None]:
        wanted = ControllerState.unpack(state)
        yield from self._to(wanted)
        yield from self._scratch.hide()
        self._configuration = None
        if wanted.interrupt_mask:
            yield WriteRegister(Reg.INTMS, le(wanted.interrupt_mask, 4))

    def start(self, state: bytes) -> Plan[None]:
        wanted = ControllerState.unpack(state)
        if not wanted.enabled:
            return
        for queue_id, commands in {0: wanted.events, **wanted.again}.items():
            queue = wanted.sqs[queue_id]
            slot = (queue.tail - len(commands)) % queue.size
            for command in commands:
                yield WriteMemory(queue.base + slot * SQE_BYTES, command)
                slot = (slot + 1) % queue.size
            if commands:
                yield self._rings.tail_doorbell(queue, queue.tail)
        for cq in wanted.cqs.values():
            # The source's interrupt for them may have come to nobody.
            if cq.unconsumed and _interrupts(cq):
                yield Signal(cq.vector)

    def _to(self, wanted: ControllerState) -> Plan[None]:
        if self._configuration is None or self._configuration != wanted.configuration():
            yield from self._build(wanted)
        if not wanted.enabled:
            return
        for cq in wanted.cqs.values():
            if cq.id:
                yield from self._walk_queue(cq, wanted)
        yield from self._walk_admin(wanted)

    # From a reset to queues that stand at 0.

    def _build(self, wanted: ControllerState) -> Plan[None]:
        yield from self._scratch.hide()
        yield ResetFunction()
        self._configuration = None
        self._sqs, self._cqs = {}, {}
        yield WriteRegister(Reg.AQA, le(wanted.aqa, 4))
        for register, base in ((Reg.ASQ, wanted.asq), (Reg.ACQ, wanted.acq)):
            yield WriteRegister(register, le(base & 0xFFFF_FFFF, 4))
            yield WriteRegister(register + 4, le(base >> 32, 4))
        yield WriteRegister(Reg.CC, le(wanted.cc & ~CC_ENABLE, 4))
        if wanted.enabled:
            self._page_bytes = PAGE_BYTES << (wanted.cc >> 7 & 0xF)
            self._data = yield from self._scratch.show(wanted.rings(), 2 * self._page_bytes)
            yield WriteRegister(Reg.CC, le(wanted.cc, 4))
            yield AwaitRegister(Reg.CSTS, 4, CSTS_READY, CSTS_READY)
            self._sqs[0] = replace(wanted.sqs[0], tail=0)
            self._cqs[0] = replace(wanted.cqs[0], position=0, head=0)
            yield from self._set_features(wanted)
            for cq in wanted.cqs.values():
                if cq.id:
                    yield from self._admin(Sqe.unpack(cq.create))
                    self._cqs[cq.id] = replace(cq, position=0, head=0)
        self._configuration = wanted.configuration()

    def _set_features(self, wanted: ControllerState) -> Plan[None]:
        for feature in wanted.features:
            command = Sqe.unpack(feature.command)
            if feature.data:
                yield WriteMemory(self._data, feature.data)
                command = replace(command, prp1=self._data, prp2=0)
            command = replace(command, cdw10=command.cdw10 & ~_SAVE)
            result = yield from self._admin(command)
            if command.cdw10 & 0xFF == Fid.NUMBER_OF_QUEUES:
                granted = (result & 0xFFFF) + 1, (result >> 16) + 1
                asked = max(wanted.sqs, default=0), max(wanted.cqs, default=0)
                if granted[0] < asked[0] or granted[1] < asked[1]:
                    raise CannotMove(
                        [
                            f"the guest uses queues up to {asked[0]} and {asked[1]}, the target's "
                            f"controller grants {granted[0]} and {granted[1]}"
                        ]
                    )

    # From there to where the guest's stand.

    def _walk_queue(self, goal: CompletionQueue, wanted: ControllerState) -> Plan[None]:
        cq = self._cqs[goal.id]
        goals = {queue.id: queue for queue in wanted.sqs.values() if queue.cq == goal.id}
        for queue in goals.values():
            if queue.id not in self._sqs:
                yield from self._create(queue)
        distance, least = _distance(cq, goal)
        rings = {
            queue_id: Ring(queue.size, self._sqs[queue_id].tail, _goal(queue, wanted))
            for queue_id, queue in goals.items()
        }
        way = positions.shortest(rings, goal.size, distance, least)
        if way is None:
            way = yield from self._walk_alone(cq, goal, wanted)
        _check_length(way.completions, goal.id)
        left = way.completions
        if way.renewed is not None:
            left -= way.before
            yield from self._io(way.renewed, way.before, goal.unconsumed - left)
            yield from self._delete(way.renewed)
            yield from self._create(goals[way.renewed])
        for queue_id, count in way.commands.items():
            left -= count
            yield from self._io(queue_id, count, goal.unconsumed - left)
        yield from self._rings.consume(cq, goal.unconsumed)

    def _walk_alone(
        self, cq: CompletionQueue, goal: CompletionQueue, wanted: ControllerState
    ) -> Plan[Way]:
        """A completion queue whose submission queues are gone: walked by one of ours."""
        count, least = _distance(cq, goal)
        while count < least:
            count += 2 * cq.size
        _check_length(count, cq.id)
        queue_id = next(at for at in range(1, len(wanted.sqs) + 2) if at not in wanted.sqs)
        size = min(_TEMPORARY_ENTRIES, (self._inventory.cap & 0xFFFF) + 1)
        create = Sqe(
            Admin.CREATE_SQ,
            0,
            prp1=self._data + self._page_bytes,
            cdw10=(size - 1) << 16 | queue_id,
            cdw11=cq.id << 16 | 1,
        )
        ring = SubmissionQueue(queue_id, size, create.prp1, cq.id, create.pack())
        yield from self._create(ring)
        yield from self._io(queue_id, count, goal.unconsumed)
        yield from self._delete(queue_id)
        return Way({})

    def _walk_admin(self, wanted: ControllerState) -> Plan[None]:
        sq, cq, goal = self._sqs[0], self._cqs[0], wanted.cqs[0]
        if len(wanted.events) >= sq.size:
            raise CannotMove([f"{len(wanted.events)} event requests, more than the queue holds"])
        tail = (wanted.sqs[0].tail - len(wanted.events)) % sq.size
        distance, least = _distance(cq, goal)
        count = positions.admin(Ring(sq.size, sq.tail, tail), cq.size, distance, least)
        if count is None:
            raise WalkFailed("the admin rings cannot be brought to where the guest's stand")
        _check_length(count, 0)
        command = Sqe(Admin.IDENTIFY, 0, prp1=self._data, cdw10=Cns.CONTROLLER)
        yield from self._rings.submit(sq, cq, [command] * count, goal.unconsumed)
        yield from self._rings.consume(cq, goal.unconsumed)

    def _io(self, queue_id: int, count: int, keep: int) -> Plan[None]:
        queue = self._sqs[queue_id]
        if count:
            commands = [self._harmless()] * count
            yield from self._rings.submit(queue, self._cqs[queue.cq], commands, keep)

    def _harmless(self) -> Sqe:
        for nsid, namespace in self._inventory.namespaces.items():
            if namespace.metadata_bytes == 0 and namespace.block_bytes <= self._page_bytes:
                return Sqe(Io.READ, 0, nsid=nsid, prp1=self._data)
        for nsid in self._inventory.namespaces:
            return Sqe(Io.FLUSH, 0, nsid=nsid)
        raise CannotMove(["the controller has no namespace to walk its queues with"])

    def _create(self, queue: SubmissionQueue) -> Plan[None]:
        yield from self._admin(Sqe.unpack(queue.create))
        self._sqs[queue.id] = replace(queue, tail=0)

    def _delete(self, queue_id: int) -> Plan[None]:
        yield from self._admin(Sqe(Admin.DELETE_SQ, 0, cdw10=queue_id))
        del self._sqs[queue_id]

    def _admin(self, command: Sqe) -> Plan[int]:
        """One admin command. Returns its result."""
        completions = yield from self._rings.submit(self._sqs[0], self._cqs[0], [command])
        return completions[0].result


def _goal(queue: SubmissionQueue, wanted: ControllerState) -> int:
    """How far the controller has to have taken a submission ring."""
    return (queue.tail - len(wanted.again.get(queue.id, ()))) % queue.size


def _distance(now: CompletionQueue, goal: CompletionQueue) -> tuple[int, int]:
    """Completions modulo twice the ring, and how many there have to be at least: those that the
    driver has not taken must not have been taken here."""
    distance = (goal.position - now.position) % (2 * goal.size)
    return distance, goal.unconsumed - now.unconsumed


def _interrupts(cq: CompletionQueue) -> bool:
    return not cq.id or bool(Sqe.unpack(cq.create).cdw11 & _INTERRUPTS_ENABLED)


def _check_length(count: int, queue_id: int) -> None:
    if count > MAX_COMMANDS:
        raise CannotMove([f"queue {queue_id} would need {count} commands to be walked"])
