"""Submitting commands to a controller whose rings are in scratch memory, as a driver would.

Owns one exchange: entries, doorbell, completions, status, and how far completions are consumed.
Positions are those of `state`, and are moved on here.
"""

from collections.abc import Sequence
from dataclasses import replace

from sync.queues.errors import WalkFailed
from sync.queues.interface import AwaitMemory, Plan, ReadMemory, WriteMemory, WriteRegister, le
from sync.queues.nvme.specification import (
    CQE_BYTES,
    SQE_BYTES,
    Cqe,
    Sqe,
    doorbell_offset,
)
from sync.queues.nvme.state import CompletionQueue, SubmissionQueue

MAX_BATCH = 64
"""Commands in flight in a walk."""


class Rings:
    """`stride` is CAP.DSTRD."""

    def __init__(self, stride: int) -> None:
        self._stride = stride

    def submit(
        self, sq: SubmissionQueue, cq: CompletionQueue, commands: Sequence[Sqe], keep: int = 0
    ) -> Plan[list[Cqe]]:
        """Have commands executed. `keep`: of all completions in the ring, as many at its end are
        left unconsumed. Raises `WalkFailed` for a status other than success."""
        done: list[Cqe] = []
        yield from self.consume(cq, keep - len(commands))
        while len(done) < len(commands):
            left = len(commands) - len(done)
            count = min(left, sq.size - 1, cq.size - 1 - cq.unconsumed, MAX_BATCH)
            batch = commands[len(done) : len(done) + count]
            yield from self._ring(sq, batch)
            completions = yield from self._completed(cq, count)
            for completion in completions:
                if completion.status:
                    command = batch[completion.cid] if completion.cid < count else None
                    what = f"{command.opcode:#04x}" if command else "nobody's"
                    raise WalkFailed(
                        f"the target's controller ended command {what} of queue {sq.id} with "
                        f"status {completion.status:#05x}"
                    )
            done += completions
            yield from self.consume(cq, keep - (left - count))
        return done

    def consume(self, cq: CompletionQueue, keep: int) -> Plan[None]:
        """Take all completions but the last `keep`."""
        count = cq.unconsumed - max(keep, 0)
        if count > 0:
            cq.head = (cq.head + count) % cq.size
            yield self._doorbell(cq.id, cq.head, completion=True)

    def tail_doorbell(self, sq: SubmissionQueue, tail: int) -> WriteRegister:
        """Tell the controller how far a submission ring is filled."""
        return self._doorbell(sq.id, tail, completion=False)

    def _ring(self, sq: SubmissionQueue, batch: Sequence[Sqe]) -> Plan[None]:
        entries = b"".join(replace(each, cid=cid).pack() for cid, each in enumerate(batch))
        room = (sq.size - sq.tail) * SQE_BYTES
        yield WriteMemory(sq.base + sq.tail * SQE_BYTES, entries[:room])
        if len(entries) > room:
            yield WriteMemory(sq.base, entries[room:])
        sq.tail = (sq.tail + len(batch)) % sq.size
        yield self.tail_doorbell(sq, sq.tail)

    def _completed(self, cq: CompletionQueue, count: int) -> Plan[list[Cqe]]:
        last = replace(cq)
        last.advance(count - 1)
        # Entries are posted in order, so the last one's phase speaks for all.
        at = cq.base + last.slot * CQE_BYTES + CQE_BYTES - 2
        yield AwaitMemory(at, 2, 1, last.phase)
        room = (cq.size - cq.slot) * CQE_BYTES
        first = min(count * CQE_BYTES, room)
        raw = yield ReadMemory(cq.base + cq.slot * CQE_BYTES, first)
        if count * CQE_BYTES > first:
            raw += yield ReadMemory(cq.base, count * CQE_BYTES - first)
        cq.advance(count)
        return [Cqe.unpack(raw[at : at + CQE_BYTES]) for at in range(0, len(raw), CQE_BYTES)]

    def _doorbell(self, queue_id: int, value: int, *, completion: bool) -> WriteRegister:
        offset = doorbell_offset(queue_id, completion=completion, stride=self._stride)
        return WriteRegister(offset, le(value, 4))
