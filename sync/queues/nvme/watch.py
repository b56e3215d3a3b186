"""Follows a controller from what its guest does: queues, positions, features, event requests.

Owns what is known of one controller. A command is read from its ring when its doorbell is about to
be written, so before the controller can act on it; a completion is read when it is consumed at the
latest, before its slot can be written again. None is missed, however seldom `look` is called.

Commands that are not known here just pass: they count as commands, and nothing follows from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sync.queues.errors import CannotMove, MemoryUnreadable
from sync.queues.interface import PAGE_BYTES, Memory, Rest, WriteWatch, number
from sync.queues.nvme.data import DirtyPages, TransferTooLarge, admin_bytes, io_bytes, pages_written
from sync.queues.nvme.inventory import Inventory
from sync.queues.nvme.refusals import FOR_GOOD, Refusal, refusal_of
from sync.queues.nvme.specification import (
    CC_ENABLE,
    CC_SHUTDOWN,
    CQE_BYTES,
    CSTS_FATAL,
    CSTS_READY,
    DOORBELLS,
    REPEATABLE,
    SQE_BYTES,
    SUBSYSTEM_RESET,
    Admin,
    Cqe,
    Fid,
    Reg,
    Sqe,
    create_queue_fields,
    doorbell_stride,
)
from sync.queues.nvme.state import CompletionQueue, ControllerState, Feature, SubmissionQueue

_PROPERTIES = 0x40
"""Bytes of the properties that a driver sets the controller up with."""
_SAVED = 1 << 31
_ENTRY_SIZES = 0xFF << 16
_ENTRY_SIZES_DEFAULT = 6 << 16 | 4 << 20
_FEATURE_BYTES = {
    Fid.LBA_RANGES: 4096,
    Fid.POWER_TRANSITIONS: 256,
    Fid.TIMESTAMP: 8,
    Fid.HOST_BEHAVIOR: 512,
    Fid.HOST_IDENTIFIER: 16,
}
_NOT_CARRIED = {
    Fid.HOST_MEMORY_BUFFER,
    Fid.SANITIZE_CONFIG,
    Fid.RESERVATION_NOTIFICATION,
    Fid.RESERVATION_PERSISTENCE,
    Fid.WRITE_PROTECTION,
}
"""Refused where it matters, or a property of the namespace."""
_SUB_FEATURE = {0x04: (16, 0x3F), 0x09: (0, 0xFFFF), 0x13: (0, 0xFFFF), 0x14: (0, 0xFFFF)}
"""Features with a value for each of something in CDW11: shift and mask."""
_RESTRUCTURING = {Admin.CREATE_CQ, Admin.CREATE_SQ, Admin.DELETE_CQ, Admin.DELETE_SQ}
_RESET = "reset"


@dataclass(frozen=True, slots=True)
class _Pending:
    command: Sqe
    data: bytes

    @property
    def is_event(self) -> bool:
        return self.command.opcode == Admin.EVENT_REQUEST


class NvmeWatch(WriteWatch):
    """One controller's watch. Without a `state` it knows the controller from its next reset on."""

    def __init__(
        self, memory: Memory, inventory: Inventory, state: ControllerState | None = None
    ) -> None:
        self._memory = memory
        self._formats = {nsid: each.form for nsid, each in inventory.namespaces.items()}
        self._doorbell_bytes = 4 << doorbell_stride(inventory.cap)
        self._dirty = DirtyPages()
        self._tracking = False
        self._busy_rings: set[int] = set()
        self._refusals: dict[Refusal, None] = {Refusal.UNSEEN: None} if state is None else {}
        self._properties = bytearray(_PROPERTIES)
        self._interrupt_mask = 0
        self._sqs: dict[int, SubmissionQueue] = {}
        self._cqs: dict[int, CompletionQueue] = {}
        self._features: dict[tuple[int, int, int], Feature] = {}
        self._pending: dict[tuple[int, int], _Pending] = {}
        if state is not None:
            self._take_over(state)

    def read(self, region: int, offset: int, data: bytes) -> None:
        at = Reg.CSTS - offset
        if region or not 0 <= at < len(data):
            return
        status = data[at]
        self._set_refusal(Refusal.FATAL, bool(status & CSTS_FATAL))
        if not status & CSTS_READY and not self._enabled:
            self._dirty.end(_RESET)

    def write(self, region: int, offset: int, data: bytes) -> None:
        if region:
            return
        if offset >= DOORBELLS:
            index, rest = divmod(offset - DOORBELLS, self._doorbell_bytes)
            if not rest and len(data) in (2, 4):
                self._doorbell(index // 2, bool(index % 2), number(data))
        elif offset <= Reg.PMRCTL < offset + len(data):
            self._set_refusal(Refusal.PERSISTENT_MEMORY, bool(data[Reg.PMRCTL - offset] & 1))
        elif offset <= Reg.CMBMSC < offset + len(data):
            self._set_refusal(Refusal.CONTROLLER_MEMORY, bool(data[Reg.CMBMSC - offset] & 3))
        elif offset == Reg.NSSR and number(data) == SUBSYSTEM_RESET:
            self.reset()
        elif offset == Reg.INTMS:
            self._interrupt_mask |= number(data)
        elif offset == Reg.INTMC:
            self._interrupt_mask &= ~number(data)
        else:
            self._write_property(offset, data)

    def reset(self) -> None:
        self._controller_reset()
        self._properties = bytearray(_PROPERTIES)
        self._dirty.end(_RESET)
        self._refusals.pop(Refusal.UNSEEN, None)

    def look(self) -> None:
        # The admin queue is the first; what it completes may make or remove others.
        for cq_id in sorted(self._cqs):
            if cq_id in self._cqs:
                self._look(self._cqs[cq_id])

    def rest(self) -> Rest:
        open_ids = {key[0] for key, each in self._pending.items() if not each.is_event}
        if not open_ids:
            return Rest.AT_REST
        cqs = [self._cqs[self._sqs[sq_id].cq] for sq_id in open_ids]
        full = all(cq.unconsumed == cq.size - 1 for cq in cqs)
        return Rest.BLOCKED if full else Rest.BUSY

    def refusals(self) -> Sequence[str]:
        return [refusal.value for refusal in self._refusals]

    def state(self) -> bytes:
        if self._refusals:
            raise CannotMove(self.refusals())
        events = [each.command.pack() for each in self._pending.values() if each.is_event]
        cqs = {each.id: replace(each) for each in self._cqs.values()}
        for (sq_id, _), each in self._pending.items():
            if not each.is_event:
                # Where it will be once this one has completed, too: what to walk to ahead of time.
                cqs[self._sqs[sq_id].cq].advance(1)
        return ControllerState(
            self._property(Reg.CC, 4),
            self._property(Reg.AQA, 4),
            self._property(Reg.ASQ, 8),
            self._property(Reg.ACQ, 8),
            self._interrupt_mask,
            dict(sorted(self._sqs.items())),
            dict(sorted(cqs.items())),
            list(self._features.values()),
            events,
        ).pack()

    def lost(self) -> bytes:
        self.look()
        if self._refusals:
            raise CannotMove(self.refusals())
        events: list[bytes] = []
        again: dict[int, list[bytes]] = {}
        for (sq_id, _), each in self._pending.items():
            if sq_id and each.command.opcode not in REPEATABLE:
                raise CannotMove([f"command {each.command.opcode:#04x} may have been executed"])
            (again.setdefault(sq_id, []) if sq_id else events).append(each.command.pack())
        return ControllerState(
            self._property(Reg.CC, 4),
            self._property(Reg.AQA, 4),
            self._property(Reg.ASQ, 8),
            self._property(Reg.ACQ, 8),
            self._interrupt_mask,
            dict(sorted(self._sqs.items())),
            dict(sorted(self._cqs.items())),
            list(self._features.values()),
            events,
            again,
        ).pack()

    def dirty(self) -> set[int]:
        self.look()
        if not self._tracking:
            self._tracking = True
            self._busy_rings.clear()
            for key, each in self._pending.items():
                self._track(key, each.command)
        self._busy_rings |= {self._sqs[sq_id].cq for sq_id, _ in self._pending}
        for cq_id in self._busy_rings & self._cqs.keys():
            self._dirty.wrote(_pages(*self._cqs[cq_id].ring))
        self._busy_rings.clear()
        return self._dirty.collect()

    def forget_dirty(self) -> None:
        self._tracking = False
        self._dirty = DirtyPages()

    # Properties.

    @property
    def _enabled(self) -> bool:
        return bool(self._property(Reg.CC, 4) & CC_ENABLE)

    def _property(self, register: Reg, length: int) -> int:
        return number(self._properties[register : register + length])

    def _write_property(self, offset: int, data: bytes) -> None:
        if offset + len(data) > _PROPERTIES:
            return
        was_enabled = self._enabled
        self._properties[offset : offset + len(data)] = data
        cc = self._property(Reg.CC, 4)
        if was_enabled and not self._enabled:
            self._controller_reset()
        if not self._enabled:
            if offset == Reg.CC:
                # Whatever there was before is gone, also what was never seen.
                self._refusals.pop(Refusal.UNSEEN, None)
        elif not was_enabled:
            self._enable(cc)
        self._set_refusal(Refusal.SHUTDOWN, bool(cc & CC_SHUTDOWN))

    def _enable(self, cc: int) -> None:
        self._dirty.end(_RESET)
        aqa = self._property(Reg.AQA, 4)
        if cc & _ENTRY_SIZES != _ENTRY_SIZES_DEFAULT and cc & _ENTRY_SIZES:
            self._set_refusal(Refusal.ENTRY_SIZES, True)
        sq_size, cq_size = (aqa & 0xFFF) + 1, (aqa >> 16 & 0xFFF) + 1
        asq, acq = self._property(Reg.ASQ, 8) & -4096, self._property(Reg.ACQ, 8) & -4096
        if not asq or not acq or min(sq_size, cq_size) < 2:
            # Kept from a time before us, perhaps.
            self._set_refusal(Refusal.UNSEEN, True)
            return
        self._sqs = {0: SubmissionQueue(0, sq_size, asq, 0)}
        self._cqs = {0: CompletionQueue(0, cq_size, acq)}

    def _controller_reset(self) -> None:
        if self._tracking:
            # Until it says that it is not ready, the controller may write.
            for cq in self._cqs.values():
                self._dirty.begin((cq.id, None), _pages(*cq.ring))
            self._dirty.rename_all(_RESET)
        self._sqs, self._cqs, self._pending = {}, {}, {}
        self._interrupt_mask = 0
        self._features = {
            key: each
            for key, each in self._features.items()
            if Sqe.unpack(each.command).cdw10 & _SAVED
        }
        kept = FOR_GOOD | {Refusal.UNSEEN}
        self._refusals = {each: None for each in self._refusals if each in kept}

    def _set_refusal(self, refusal: Refusal, on: bool) -> None:
        if on:
            self._refusals[refusal] = None
        else:
            self._refusals.pop(refusal, None)

    def _take_over(self, state: ControllerState) -> None:
        for register, value, length in (
            (Reg.CC, state.cc, 4),
            (Reg.AQA, state.aqa, 4),
            (Reg.ASQ, state.asq, 8),
            (Reg.ACQ, state.acq, 8),
        ):
            self._properties[register : register + length] = value.to_bytes(length, "little")
        self._interrupt_mask = state.interrupt_mask
        self._sqs, self._cqs = dict(state.sqs), dict(state.cqs)
        for feature in state.features:
            self._features[_feature_key(Sqe.unpack(feature.command))] = feature
        for sq_id, commands in {0: state.events, **state.again}.items():
            for each in commands:
                command = Sqe.unpack(each)
                of_feature = not sq_id and command.opcode == Admin.SET_FEATURES
                data = self._feature_data(command) if of_feature else b""
                self._pending[sq_id, command.cid] = _Pending(command, data)

    # Doorbells.

    def _doorbell(self, queue_id: int, completion: bool, value: int) -> None:
        if 0 not in self._cqs:
            return
        if any(
            key[0] == 0 and each.command.opcode in _RESTRUCTURING
            for key, each in self._pending.items()
        ):
            # The guest may use a queue whose making it has seen to complete, and we have not.
            self._look(self._cqs[0])
        if completion:
            cq = self._cqs.get(queue_id)
            if cq is None or value >= cq.size:
                self._set_refusal(Refusal.LOST_TRACK, True)
                return
            self._look(cq)
            if (value - cq.head) % cq.size > cq.unconsumed:
                self._set_refusal(Refusal.LOST_TRACK, True)
            cq.head = value
            return
        sq = self._sqs.get(queue_id)
        if sq is None or value >= sq.size:
            self._set_refusal(Refusal.LOST_TRACK, True)
            return
        self._look(self._cqs[sq.cq])
        while sq.tail != value:
            try:
                entry = self._memory.read(sq.base + sq.tail * SQE_BYTES, SQE_BYTES)
            except MemoryUnreadable:
                self._set_refusal(Refusal.FOREIGN_QUEUE, True)
                return
            self._begin(sq, Sqe.unpack(entry))
            sq.tail = (sq.tail + 1) % sq.size

    def _begin(self, sq: SubmissionQueue, command: Sqe) -> None:
        admin = sq.id == 0
        key = (sq.id, command.cid)
        if key in self._pending:
            self._set_refusal(Refusal.LOST_TRACK, True)
        refusal = refusal_of(command, admin=admin)
        if refusal is not None:
            self._set_refusal(refusal, True)
            if refusal is Refusal.NAMESPACES:
                self._formats.clear()
        data = b""
        if admin and command.opcode == Admin.SET_FEATURES:
            data = self._feature_data(command)
            if command.cdw10 & 0xFF == Fid.HOST_MEMORY_BUFFER:
                self._set_refusal(Refusal.HOST_MEMORY_BUFFER, bool(command.cdw11 & 1))
        self._pending[key] = _Pending(command, data)
        if self._tracking:
            self._track(key, command)

    def _track(self, key: tuple[int, int], command: Sqe) -> None:
        if not command.to_host:
            return
        form = self._formats.get(command.nsid)
        length = io_bytes(command, form) if key[0] else admin_bytes(command)
        metadata = None
        if form is not None and length is not None:
            metadata = form.metadata_bytes * ((command.cdw12 & 0xFFFF) + 1)
        try:
            pages = pages_written(command, length, metadata, self._memory, self._page_bytes)
        except TransferTooLarge:
            self._set_refusal(Refusal.LOST_TRACK, True)
        else:
            self._dirty.begin(key, pages)

    @property
    def _page_bytes(self) -> int:
        return PAGE_BYTES << (self._property(Reg.CC, 4) >> 7 & 0xF)

    def _feature_data(self, command: Sqe) -> bytes:
        """What the command's buffer holds. Features that are not known may have one, too."""
        if not command.prp1:
            return b""
        fid = command.cdw10 & 0xFF
        known = _FEATURE_BYTES.get(Fid(fid)) if fid in set(Fid) else None
        room = self._page_bytes - command.prp1 % self._page_bytes
        length = min(known or room, PAGE_BYTES)
        try:
            data = self._memory.read(command.prp1, min(length, room))
            if len(data) < length:
                data += self._memory.read(command.prp2, length - len(data))
        except MemoryUnreadable:
            return b""
        return data

    # Completions.

    def _look(self, cq: CompletionQueue) -> None:
        while cq.unconsumed < cq.size - 1 and self._cqs.get(cq.id) is cq:
            try:
                raw = self._memory.read(cq.base + cq.slot * CQE_BYTES, CQE_BYTES)
            except MemoryUnreadable:
                self._set_refusal(Refusal.FOREIGN_QUEUE, True)
                return
            entry = Cqe.unpack(raw)
            if entry.phase != cq.phase:
                return
            cq.advance(1)
            self._busy_rings.add(cq.id)
            self._end(entry)

    def _end(self, entry: Cqe) -> None:
        key = (entry.sq_id, entry.cid)
        pending = self._pending.pop(key, None)
        self._dirty.end(key)
        if pending is None:
            if entry.sq_id in self._sqs:
                self._set_refusal(Refusal.LOST_TRACK, True)
        elif entry.sq_id == 0 and entry.status == 0:
            self._admin_succeeded(pending)

    def _admin_succeeded(self, pending: _Pending) -> None:
        command = pending.command
        queue_id, size = create_queue_fields(command)
        match command.opcode:
            case Admin.CREATE_CQ:
                if self._is_sound(command, size):
                    self._cqs[queue_id] = CompletionQueue(
                        queue_id, size, command.prp1, command.pack(), command.cdw11 >> 16
                    )
            case Admin.CREATE_SQ:
                cq_id = command.cdw11 >> 16
                if cq_id not in self._cqs:
                    self._set_refusal(Refusal.LOST_TRACK, True)
                elif self._is_sound(command, size):
                    self._sqs[queue_id] = SubmissionQueue(
                        queue_id, size, command.prp1, cq_id, command.pack()
                    )
            case Admin.DELETE_SQ:
                self._drop(queue_id)
            case Admin.DELETE_CQ if queue_id in self._cqs and queue_id:
                if self._tracking:
                    self._dirty.wrote(_pages(*self._cqs[queue_id].ring))
                for sq_id in [sq.id for sq in self._sqs.values() if sq.cq == queue_id]:
                    self._set_refusal(Refusal.LOST_TRACK, True)
                    self._drop(sq_id)
                del self._cqs[queue_id]
            case Admin.SET_FEATURES if command.cdw10 & 0xFF not in _NOT_CARRIED:
                feature = _feature_key(command)
                # The order is that in which they came.
                self._features.pop(feature, None)
                self._features[feature] = Feature(command.pack(), pending.data)

    def _is_sound(self, command: Sqe, size: int) -> bool:
        """Whether a queue is one that can be followed."""
        queue_id, _ = create_queue_fields(command)
        if not command.cdw11 & 1:
            self._set_refusal(Refusal.SCATTERED_QUEUE, True)
        elif not queue_id or size < 2 or command.prp1 % PAGE_BYTES:
            self._set_refusal(Refusal.LOST_TRACK, True)
        else:
            return True
        return False

    def _drop(self, sq_id: int) -> None:
        """A submission queue was deleted, and with it what was under way."""
        if sq_id:
            self._sqs.pop(sq_id, None)
        for key in [key for key in self._pending if key[0] == sq_id != 0]:
            del self._pending[key]
            self._dirty.end(key)


def _feature_key(command: Sqe) -> tuple[int, int, int]:
    fid = command.cdw10 & 0xFF
    shift, mask = _SUB_FEATURE.get(fid, (0, 0))
    return fid, command.nsid, command.cdw11 >> shift & mask


def _pages(iova: int, length: int) -> set[int]:
    return set(range(iova // PAGE_BYTES, (iova + length - 1) // PAGE_BYTES + 1))
