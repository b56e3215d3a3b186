"""A block request as the workload and the driver hand it to each other."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from lab.guest.errors import StreamError
from lab.guest.fields import U64, Fields


class Kind(StrEnum):
    """What a request wants of the disk."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    GET_ID = "get-id"


@dataclass(slots=True)
class Request:
    """A request in flight. It is VM state: it moves with the guest."""

    kind: Kind
    block: int = 0
    """Which block of the disk it reads or writes."""
    buffer: int = 0
    """Number of its buffer, in the read area (READ, GET_ID) or the write area (WRITE)."""
    checksum: int = 0
    """XXH3 of the data that is written."""
    generation: int = 0
    """How often the block was written, this time included."""
    indirect: bool = False
    verifying: bool = False
    """Whether it belongs to a verification of the whole disk."""
    submitted_at: float = 0.0
    """Seconds since the epoch, since it may end on another host."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields, *, n_blocks: int, n_buffers: dict[Kind, int]) -> "Request":
        """Raises `StreamError` for anything that is not in the guest's areas."""
        try:
            kind = Kind(fields.text("kind"))
        except ValueError:
            raise StreamError("a request of an unknown kind") from None
        return cls(
            kind,
            block=fields.number("block", n_blocks - 1),
            buffer=fields.number("buffer", n_buffers[kind] - 1),
            checksum=fields.number("checksum", U64),
            generation=fields.number("generation", U64),
            indirect=fields.flag("indirect"),
            verifying=fields.flag("verifying"),
            submitted_at=fields.real("submitted_at"),
        )
