"""What a controller is and which namespaces it holds, asked of the controller itself.

Owns the plan that asks, its result, and the comparison of two of them: a guest goes on only where
the controller, as it was told of it, and its namespaces are the same.

Sources: Base Specification 2.0, sections 5.17 (Identify), figures 275 (controller) and 277 (IDs);
NVM Command Set 1.0, figure 97 (namespace).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

from sync.queues.errors import StateError, WalkFailed
from sync.queues.interface import (
    AwaitRegister,
    MapScratch,
    Plan,
    ReadMemory,
    ReadRegister,
    ResetFunction,
    UnmapScratch,
    WriteRegister,
    le,
    number,
)
from sync.queues.nvme.data import Format
from sync.queues.nvme.rings import Rings
from sync.queues.nvme.specification import (
    CC_ENABLE,
    CSTS_READY,
    DEFAULT_CC,
    IDENTIFY_BYTES,
    Admin,
    Cns,
    Reg,
    Sqe,
    doorbell_stride,
)
from sync.queues.nvme.state import CompletionQueue, SubmissionQueue

MAX_NAMESPACES = 1024
MAX_INVENTORY_BYTES = 4 << 20

_SCRATCH = 0x10_0000
_ENTRIES = 4
_TIMEOUT_BITS = 0xFF << 24
"""CAP.TO: how long it takes to get ready says nothing about what it is."""
_LISTS = 0x0001_0100
"""NVMe 1.1 has lists of namespaces, 1.3 descriptors."""
_DESCRIPTORS = 0x0001_0300
_CONTROLLER_FIELDS = {
    "serial number": (4, 20),
    "model": (24, 40),
    "firmware": (64, 8),
    "largest transfer": (77, 1),
    "admin commands": (256, 2),
    "event requests": (259, 1),
    "entry sizes": (512, 2),
    "number of namespaces": (516, 4),
    "I/O commands": (520, 2),
    "fused operations": (522, 2),
    "write cache": (525, 1),
    "SGL support": (536, 4),
}
_TEXTS = ("serial number", "model", "firmware")


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace as its data structure says it is."""

    blocks: int
    capacity: int
    block_bytes: int
    metadata_bytes: int
    interleaved: bool
    """Metadata lies between the blocks."""
    protection: int
    identifiers: str
    """EUI64, NGUID and the descriptors, in hexadecimal digits."""

    @property
    def form(self) -> Format:
        if self.interleaved:
            return Format(self.block_bytes + self.metadata_bytes, 0)
        return Format(self.block_bytes, self.metadata_bytes)


@dataclass(frozen=True, slots=True)
class Inventory:
    """A controller and its active namespaces."""

    cap: int
    version: int
    controller: Mapping[str, str]
    namespaces: Mapping[int, Namespace]

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Inventory":
        """Raises `StateError`."""
        try:
            if len(data) > MAX_INVENTORY_BYTES:
                raise ValueError(f"{len(data)} bytes")
            document = json.loads(data)
            namespaces = {
                int(nsid): Namespace(**each) for nsid, each in document["namespaces"].items()
            }
            controller = {str(name): str(text) for name, text in document["controller"].items()}
            return cls(int(document["cap"]), int(document["version"]), controller, namespaces)
        except (
            LookupError,
            ValueError,
            ArithmeticError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise StateError(f"the inventory of a controller is malformed: {error!r}") from error

    def properties(self) -> Iterator[tuple[str, str]]:
        """What has to be the same on both sides, by name."""
        yield "capabilities", f"{self.cap & ~_TIMEOUT_BITS:#x}"
        yield "version", f"{self.version:#x}"
        yield from self.controller.items()
        for nsid, namespace in self.namespaces.items():
            for name, value in asdict(namespace).items():
                yield f"namespace {nsid} {name.replace('_', ' ')}", str(value)


def take_inventory() -> Plan[Inventory]:
    """Reset the controller, ask it, and reset it again. Raises `WalkFailed`."""
    yield ResetFunction()
    cap = number((yield ReadRegister(Reg.CAP, 8)))
    version = number((yield ReadRegister(Reg.VS, 4)))
    page_bits = cap >> 48 & 0xF
    page_bytes = 4096 << page_bits
    sq = SubmissionQueue(0, _ENTRIES, _SCRATCH, 0)
    cq = CompletionQueue(0, _ENTRIES, _SCRATCH + page_bytes)
    data = _SCRATCH + 2 * page_bytes
    yield MapScratch(_SCRATCH, 3 * page_bytes)
    yield WriteRegister(Reg.AQA, le((_ENTRIES - 1) << 16 | (_ENTRIES - 1), 4))
    for register, base in ((Reg.ASQ, sq.base), (Reg.ACQ, cq.base)):
        yield WriteRegister(register, le(base & 0xFFFF_FFFF, 4))
        yield WriteRegister(register + 4, le(base >> 32, 4))
    yield WriteRegister(Reg.CC, le(DEFAULT_CC | page_bits << 7 | CC_ENABLE, 4))
    yield AwaitRegister(Reg.CSTS, 4, CSTS_READY, CSTS_READY)
    rings = Rings(doorbell_stride(cap))

    def identify(cns: int, nsid: int = 0) -> Plan[bytes]:
        command = Sqe(Admin.IDENTIFY, 0, nsid=nsid, prp1=data, cdw10=cns)
        yield from rings.submit(sq, cq, [command])
        return (yield ReadMemory(data, IDENTIFY_BYTES))

    controller = yield from identify(Cns.CONTROLLER)
    namespaces: dict[int, Namespace] = {}
    for nsid in (yield from _active(identify, controller, version)):
        structure = yield from identify(Cns.NAMESPACE, nsid)
        descriptors = b""
        if version >= _DESCRIPTORS:
            descriptors = yield from identify(Cns.DESCRIPTORS, nsid)
        namespaces[nsid] = _namespace(structure, descriptors)
    yield WriteRegister(Reg.CC, le(0, 4))
    yield AwaitRegister(Reg.CSTS, 4, CSTS_READY, 0)
    yield UnmapScratch(_SCRATCH, 3 * page_bytes)
    yield ResetFunction()
    fields = {}
    for name, (at, length) in _CONTROLLER_FIELDS.items():
        raw = controller[at : at + length]
        text = raw.decode("ascii", "replace").strip("\0 ") if name in _TEXTS else raw[::-1].hex()
        fields[name] = text
    return Inventory(cap, version, fields, namespaces)


def _active(
    identify: Callable[[int, int], Plan[bytes]], controller: bytes, version: int
) -> Plan[list[int]]:
    if version < _LISTS:
        return list(range(1, number(controller[516:520]) + 1))
    found: list[int] = []
    while True:
        raw = yield from identify(Cns.ACTIVE_NAMESPACES, found[-1] if found else 0)
        part = [number(raw[at : at + 4]) for at in range(0, len(raw), 4)]
        ids = [nsid for nsid in part if nsid]
        if len(found) + len(ids) > MAX_NAMESPACES or ids != sorted({*ids}):
            raise WalkFailed("the controller's list of namespaces makes no sense")
        found += ids
        if len(ids) < len(part):
            return found


def _namespace(structure: bytes, descriptors: bytes) -> Namespace:
    flbas = structure[26]
    index = flbas & 0xF | (flbas >> 5 & 3) << 4
    lba_format = number(structure[128 + 4 * index : 132 + 4 * index])
    return Namespace(
        blocks=number(structure[0:8]),
        capacity=number(structure[8:16]),
        block_bytes=1 << (lba_format >> 16 & 0xFF),
        metadata_bytes=lba_format & 0xFFFF,
        interleaved=bool(flbas & 0x10),
        protection=structure[29],
        identifiers=(structure[104:128] + descriptors.rstrip(b"\0")).hex(),
    )
