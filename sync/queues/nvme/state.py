"""What a controller is made of besides guest memory: properties, queues and their positions,
features, event requests under way.

Owns the form in which it goes to the target, and the check of one that came from a peer (I9). A
position counts entries of a completion ring modulo twice its size: the slot and the phase in one.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from sync.queues.errors import StateError
from sync.queues.interface import MAX_STATE_BYTES
from sync.queues.nvme.specification import CQE_BYTES, MAX_QUEUE_SIZE, SQE_BYTES

MAX_FEATURES = 1024
MAX_EVENTS = 256
"""A controller takes up to AERL + 1, of one byte."""
MAX_FEATURE_BYTES = 4096


@dataclass(slots=True)
class CompletionQueue:
    """A completion ring: `position` is where the controller writes next, `head` the doorbell."""

    id: int
    size: int
    base: int
    create: bytes = b""
    """The guest's create command; none for the admin queue."""
    vector: int = 0
    position: int = 0
    head: int = 0

    @property
    def slot(self) -> int:
        return self.position % self.size

    @property
    def phase(self) -> int:
        """Of the entry that the controller writes next."""
        return 1 - self.position // self.size

    @property
    def unconsumed(self) -> int:
        """Completions that the driver has not taken yet."""
        return (self.slot - self.head) % self.size

    def advance(self, count: int) -> None:
        self.position = (self.position + count) % (2 * self.size)

    @property
    def ring(self) -> tuple[int, int]:
        """IOVA and length in bytes."""
        return self.base, self.size * CQE_BYTES


@dataclass(slots=True)
class SubmissionQueue:
    """A submission ring of which the controller has taken everything before `tail`."""

    id: int
    size: int
    base: int
    cq: int
    create: bytes = b""
    tail: int = 0

    @property
    def ring(self) -> tuple[int, int]:
        """IOVA and length in bytes."""
        return self.base, self.size * SQE_BYTES


@dataclass(frozen=True, slots=True)
class Feature:
    """A Set Features command that succeeded, and what its buffer held."""

    command: bytes
    data: bytes


@dataclass(slots=True)
class ControllerState:
    """A controller at rest. Queue 0 is the admin queue; there are none unless it is enabled."""

    cc: int
    aqa: int
    asq: int
    acq: int
    interrupt_mask: int
    sqs: dict[int, SubmissionQueue]
    cqs: dict[int, CompletionQueue]
    features: list[Feature]
    events: list[bytes]
    """Event requests that the controller holds; of one that has died, all commands of its admin
    queue that it did not complete."""
    again: dict[int, list[bytes]] = field(default_factory=dict)
    """Of a controller that has died, the commands that it did not complete, by I/O queue."""

    @property
    def enabled(self) -> bool:
        return bool(self.cc & 1)

    def configuration(self) -> object:
        """What does not change while commands just come and go."""
        return (
            (self.cc, self.aqa, self.asq, self.acq),
            [(queue.id, queue.size, queue.base, queue.create) for queue in self.cqs.values()],
            [(queue.id, queue.size, queue.base, queue.create) for queue in self.sqs.values()],
            [(feature.command, feature.data) for feature in self.features],
        )

    def rings(self) -> Iterator[tuple[int, int]]:
        """IOVA and length of every ring."""
        yield from (queue.ring for queue in self.sqs.values())
        yield from (queue.ring for queue in self.cqs.values())

    def pack(self) -> bytes:
        document: dict[str, object] = {
            "cc": self.cc,
            "aqa": self.aqa,
            "asq": self.asq,
            "acq": self.acq,
            "interrupt_mask": self.interrupt_mask,
            "sqs": [asdict(queue) for queue in self.sqs.values()],
            "cqs": [asdict(queue) for queue in self.cqs.values()],
            "features": [asdict(feature) for feature in self.features],
            "events": self.events,
        }
        if self.again:
            document["again"] = {str(queue): commands for queue, commands in self.again.items()}
        return json.dumps(document, default=bytes.hex).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "ControllerState":
        """Raises `StateError` unless everything in it makes sense."""
        if len(data) > MAX_STATE_BYTES:
            raise StateError(f"a controller's state of {len(data)} bytes")
        try:
            document = json.loads(data)
            state = cls(
                _number(document["cc"], 32),
                _number(document["aqa"], 32),
                _number(document["asq"], 64),
                _number(document["acq"], 64),
                _number(document["interrupt_mask"], 32),
                {each["id"]: _submission_queue(each) for each in document["sqs"]},
                {each["id"]: _completion_queue(each) for each in document["cqs"]},
                [
                    Feature(
                        _bytes(each["command"], SQE_BYTES),
                        _bytes(each["data"], MAX_FEATURE_BYTES),
                    )
                    for each in document["features"]
                ],
                [_bytes(each, SQE_BYTES) for each in document["events"]],
                {
                    int(queue): [_bytes(each, SQE_BYTES) for each in commands]
                    for queue, commands in document.get("again", {}).items()
                },
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StateError(f"the state of a controller is malformed: {error!r}") from error
        state._check()
        return state

    def _check(self) -> None:
        commands = [
            *(feature.command for feature in self.features),
            *self.events,
            *(command for commands in self.again.values() for command in commands),
            *(queue.create for queue in self.sqs.values() if queue.id),
            *(queue.create for queue in self.cqs.values() if queue.id),
        ]
        if (
            any(len(command) != SQE_BYTES for command in commands)
            or any(queue.cq not in self.cqs for queue in self.sqs.values())
            or (self.enabled and not (0 in self.sqs and 0 in self.cqs and self.sqs[0].cq == 0))
            or (not self.enabled and (self.sqs or self.cqs))
            or len(self.features) > MAX_FEATURES
            or len(self.events) > MAX_EVENTS
            or any(
                not queue or queue not in self.sqs or len(commands) >= self.sqs[queue].size
                for queue, commands in self.again.items()
            )
        ):
            raise StateError("the state of a controller is not consistent")


def _submission_queue(each: dict[str, object]) -> SubmissionQueue:
    size = _size(each["size"])
    return SubmissionQueue(
        _number(each["id"], 16),
        size,
        _base(each["base"]),
        _number(each["cq"], 16),
        _bytes(each["create"], SQE_BYTES),
        _below(each["tail"], size),
    )


def _completion_queue(each: dict[str, object]) -> CompletionQueue:
    size = _size(each["size"])
    return CompletionQueue(
        _number(each["id"], 16),
        size,
        _base(each["base"]),
        _bytes(each["create"], SQE_BYTES),
        _number(each["vector"], 11),
        _below(each["position"], 2 * size),
        _below(each["head"], size),
    )


def _number(value: object, bits: int) -> int:
    return _below(value, 1 << bits)


def _below(value: object, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise ValueError(f"{value!r} is no number below {limit}")
    return value


def _size(value: object) -> int:
    size = _below(value, MAX_QUEUE_SIZE + 1)
    if size < 2:
        raise ValueError(f"a queue of {size} entries")
    return size


def _base(value: object) -> int:
    base = _number(value, 64)
    if base % 4096 or base + MAX_QUEUE_SIZE * SQE_BYTES > 1 << 64:
        raise ValueError(f"a queue at {base:#x}")
    return base


def _bytes(value: object, limit: int) -> bytes:
    if not isinstance(value, str) or len(value) > 2 * limit:
        raise ValueError("no bytes")
    return bytes.fromhex(value)
