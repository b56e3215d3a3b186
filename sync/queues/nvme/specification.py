"""The numbers and forms of NVMe that the watch and the walk use.

Owns no behaviour. Sources: NVM Express Base Specification 2.0, sections 3.1.3 (properties), 3.3.3
(entries), 5 (admin commands); NVMe over PCIe Transport 1.0, section 3.1.2 (doorbells); NVM Command
Set 1.0, section 3.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

CLASS_CODE = 0x010802

SQE_BYTES = 64
CQE_BYTES = 16
IDENTIFY_BYTES = 4096
DOORBELLS = 0x1000
MAX_QUEUE_SIZE = 65536


class Reg(IntEnum):
    """Offsets of properties in BAR 0."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    NSSR = 0x20
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    CMBLOC = 0x38
    CMBSZ = 0x3C
    CMBMSC = 0x50
    PMRCTL = 0xE04


CC_ENABLE = 1
CC_SHUTDOWN = 3 << 14
CSTS_READY = 1
CSTS_FATAL = 2
SUBSYSTEM_RESET = 0x4E564D65
"""What written to NSSR resets: "NVMe"."""
DEFAULT_CC = 6 << 16 | 4 << 20
"""Entries of 64 and 16 bytes, pages of 4 KiB, the NVM command set."""


class Admin(IntEnum):
    """Opcodes of the admin queue."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    EVENT_REQUEST = 0x0C
    NAMESPACE_MANAGEMENT = 0x0D
    FIRMWARE_COMMIT = 0x10
    FIRMWARE_DOWNLOAD = 0x11
    NAMESPACE_ATTACHMENT = 0x15
    DIRECTIVE_SEND = 0x19
    DIRECTIVE_RECEIVE = 0x1A
    VIRTUALIZATION = 0x1C
    DOORBELL_BUFFER = 0x7C
    FORMAT = 0x80
    SECURITY_SEND = 0x81
    SECURITY_RECEIVE = 0x82
    SANITIZE = 0x84


class Io(IntEnum):
    """Opcodes of the I/O queues."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_UNCORRECTABLE = 0x04
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C
    RESERVATION_REGISTER = 0x0D
    RESERVATION_REPORT = 0x0E
    RESERVATION_ACQUIRE = 0x11
    ZONE_RECEIVE = 0x7A


REPEATABLE = frozenset(
    {
        *(Io.FLUSH, Io.WRITE, Io.READ, Io.WRITE_UNCORRECTABLE, Io.WRITE_ZEROES),
        *(Io.DATASET_MANAGEMENT, Io.VERIFY, Io.RESERVATION_REPORT, Io.ZONE_RECEIVE),
    }
)
"""Commands that may be executed twice while they are under way."""


class Fid(IntEnum):
    """Features that are treated in a way of their own."""

    LBA_RANGES = 0x03
    NUMBER_OF_QUEUES = 0x07
    POWER_TRANSITIONS = 0x0C
    HOST_MEMORY_BUFFER = 0x0D
    TIMESTAMP = 0x0E
    HOST_BEHAVIOR = 0x16
    SANITIZE_CONFIG = 0x17
    HOST_IDENTIFIER = 0x81
    RESERVATION_NOTIFICATION = 0x82
    RESERVATION_PERSISTENCE = 0x83
    WRITE_PROTECTION = 0x84


class Cns(IntEnum):
    """What an Identify asks for."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    DESCRIPTORS = 0x03


DATA_TO_HOST = 0b10
"""The bit of an opcode that says that the controller writes to the host."""

_SQE = struct.Struct("<BBHIII QQQ IIIIII")


@dataclass(frozen=True, slots=True)
class Sqe:
    """A submission queue entry."""

    opcode: int
    cid: int
    flags: int = 0
    nsid: int = 0
    mptr: int = 0
    prp1: int = 0
    prp2: int = 0
    cdw10: int = 0
    cdw11: int = 0
    cdw12: int = 0
    cdw13: int = 0
    cdw14: int = 0
    cdw15: int = 0

    @property
    def to_host(self) -> bool:
        """Whether the controller writes the data."""
        return bool(self.opcode & DATA_TO_HOST)

    @property
    def sgl(self) -> bool:
        """Whether the data pointer is a descriptor of a scatter-gather list."""
        return bool(self.flags >> 6)

    def pack(self) -> bytes:
        return _SQE.pack(
            self.opcode,
            self.flags,
            self.cid,
            self.nsid,
            0,
            0,
            self.mptr,
            self.prp1,
            self.prp2,
            self.cdw10,
            self.cdw11,
            self.cdw12,
            self.cdw13,
            self.cdw14,
            self.cdw15,
        )

    @classmethod
    def unpack(cls, data: bytes) -> "Sqe":
        opcode, flags, cid, nsid, _, _, mptr, prp1, prp2, *dwords = _SQE.unpack(data)
        return cls(opcode, cid, flags, nsid, mptr, prp1, prp2, *dwords)


_CQE = struct.Struct("<IIHHHH")


@dataclass(frozen=True, slots=True)
class Cqe:
    """A completion queue entry."""

    result: int
    sq_head: int
    sq_id: int
    cid: int
    phase: int
    status: int
    """Type and code; 0 is success."""

    @classmethod
    def unpack(cls, data: bytes) -> "Cqe":
        result, _, sq_head, sq_id, cid, status = _CQE.unpack(data)
        return cls(result, sq_head, sq_id, cid, status & 1, status >> 1 & 0x7FF)


def create_queue_fields(command: Sqe) -> tuple[int, int]:
    """ID and number of entries that a create command asks for."""
    return command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1


def doorbell_offset(queue_id: int, *, completion: bool, stride: int) -> int:
    """Where a doorbell is; `stride` is CAP.DSTRD."""
    return DOORBELLS + (2 * queue_id + completion) * (4 << stride)


def doorbell_stride(cap: int) -> int:
    """CAP.DSTRD."""
    return cap >> 32 & 0xF
