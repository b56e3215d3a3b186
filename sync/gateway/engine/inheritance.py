"""What a gateway hands on to the process that takes its place: plain data, and descriptors.

Owned here: the shape with its version, how a link is taken apart, and how it is put together again.
Not owned: how it crosses (`succession`), and the sockets' handlers (`loop`).

It is taken between two messages: nothing is under way to the device, and what the VMM has sent
meanwhile goes along, unread. No migration is under way either, so there is no journal and no dirty
bitmap; the records are read again from their file, which goes along with its lock.

A descriptor is written as its place in the list of those that are handed on, -1 for one that was
lost on its way to us. `STATE_VERSION` goes up with any change of a shape here or below
`DeviceFacts`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sync.gateway.control.info import Recovery, VmmConnection
from sync.gateway.control.shapes import pack, unpack
from sync.gateway.control.wire import ControlMessage, decode_plain, encode_plain
from sync.gateway.datapath.dma import AtDevice
from sync.gateway.datapath.peer import Chunk, Peer
from sync.gateway.datapath.relay import Send
from sync.gateway.engine.custody import Custody, CustodyState, Owner
from sync.gateway.engine.device_handshake import DeviceFacts
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.keeper import revive
from sync.gateway.errors import UpgradeFailed
from sync.registers.find import Origin
from sync.vfio_user.protocol import DmaMap

STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a stream, and the descriptors that come with the last of them."""

    data: bytes
    files: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Connection:
    """A socket; what was read from it and not handled; what is still to be sent."""

    socket: int
    arrived: tuple[Part, ...]
    leaving: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Listening:
    """A listening socket; (device, inode) of its file, if that is to go with it."""

    socket: int
    identity: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Region:
    """Of the DMA map."""

    address: int
    size: int
    offset: int
    flags: int
    at_device: int
    file: int | None


@dataclass(frozen=True, slots=True)
class Question:
    """A command of the device that is the VMM's to answer: our id, the device's, on which socket
    it came."""

    ours: int
    theirs: int
    by_twin: bool


@dataclass(frozen=True, slots=True)
class Link:
    """A connection to a device that has been asked everything."""

    facts: DeviceFacts
    generation: int
    regions: tuple[Region, ...]
    vectors: tuple[tuple[int, int, int], ...]
    """Interrupt index, vector, descriptor."""
    vmm_max_bytes: int
    questions: tuple[Question, ...]
    deferred: tuple[tuple[int, int, int], ...]
    """Region, offset, bits."""
    counters: tuple[tuple[int, int, int, int], ...]
    """Region, offset, size, count."""
    dropped: int
    vmm_starts: bool
    migration_touched: bool
    state_came: bool
    comebacks: int
    keeper: str
    """What is kept of the device for another process of it, in JSON; '' is nothing."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """`Custody`, without its records."""

    state: CustodyState
    owner: Owner
    session: str
    migrations: int
    vmm_connected: bool
    holds_copy: bool


@dataclass(frozen=True, slots=True)
class State:
    """All of a gateway. `held_since` is when its guest began to wait, on the system's clock."""

    vmm_path: str
    control_path: str
    device_path: str
    device_path_now: str
    """Of the device that was put in the first one's place, if one was."""
    vmm_listener: Listening
    control_listener: Listening
    records: int
    ownership: Ownership
    last_recovery: Recovery | None
    vmm: VmmConnection
    orphaned: bool
    generation: int
    held_since: float
    link: Link | None = None
    device: Connection | None = None
    twin: Connection | None = None
    vmm_connection: Connection | None = None


class Inherited(NamedTuple):
    """A state, and the descriptors, now of this process."""

    state: State
    files: list[int]

    def file(self, number: int) -> int:
        """Takes a descriptor out: it is the caller's from here on."""
        if number < 0:
            return number
        found, self.files[number] = self.files[number], -1
        return found

    def chunks(self, parts: Sequence[Part]) -> list[Chunk]:
        return [(part.data, [self.file(each) for each in part.files]) for part in parts]


class Estate:
    """Collects the descriptors that are handed on; they stay their owners'."""

    def __init__(self) -> None:
        self.files: list[int] = []

    def put(self, descriptor: int) -> int:
        if descriptor < 0:
            return descriptor
        self.files.append(descriptor)
        return len(self.files) - 1

    def connection(self, peer: Peer, held: Sequence[Chunk] = ()) -> Connection:
        """`held`: what was read before the rest, and waits."""
        return Connection(
            self.put(peer.fileno()),
            self._parts([*held, *peer.unread()]),
            self._parts(peer.unsent()),
        )

    def _parts(self, chunks: Sequence[Chunk]) -> tuple[Part, ...]:
        return tuple(
            Part(bytes(data), tuple(map(self.put, descriptors))) for data, descriptors in chunks
        )

    def link(self, link: DeviceLink, twin: Send | None) -> Link:
        """Raises `UpgradeFailed` while something is under way that has to end first."""
        if link.relay.awaiting_device:
            raise UpgradeFailed("the device has not answered yet: try again")
        questions = []
        for ours, theirs, back in link.relay.questions():
            if back not in (link.relay.to_device, twin):
                raise UpgradeFailed("a large access of the device is under way: try again")
            questions.append(Question(ours, theirs, back == twin))
        bits, counters = link.deferred.plain()
        return Link(
            facts=link.facts,
            generation=link.memory.generation,
            regions=tuple(
                Region(
                    region.request.address,
                    region.request.size,
                    region.request.offset,
                    int(region.request.flags),
                    region.at_device.value,
                    None if region.descriptor is None else self.put(region.descriptor),
                )
                for region in link.memory.regions
            ),
            vectors=tuple(
                (index, vector, self.put(descriptor))
                for index, vector, descriptor in link.interrupts.assigned
            ),
            vmm_max_bytes=link.service.vmm_max_bytes,
            questions=tuple(questions),
            deferred=bits,
            counters=counters,
            dropped=link.gate.dropped,
            vmm_starts=link.gate.acknowledge_reset,
            migration_touched=link.migration_touched,
            state_came=link.state_came,
            comebacks=link.comebacks,
            keeper=json.dumps(link.keeper.plain()) if link.keeper else "",
        )


def ownership(custody: Custody) -> Ownership:
    return Ownership(
        custody.state,
        custody.owner,
        custody.session,
        custody.migrations,
        custody.vmm_connected,
        custody.holds_copy,
    )


def own(custody: Custody, was: Ownership) -> None:
    """Has `custody` stand where `was` stood."""
    custody.state, custody.owner, custody.session = was.state, was.owner, was.session
    custody.migrations = was.migrations
    custody.vmm_connected, custody.holds_copy = was.vmm_connected, was.holds_copy


def furnish(
    link: DeviceLink,
    was: Link,
    custody: Custody,
    heir: Inherited,
    twin: Send,
    origins: Sequence[Origin],
) -> None:
    """Has a new link stand where `was` stood. Raises `DmaFault`, OSError."""
    link.facts = was.facts
    if was.keeper and (keeper := revive(json.loads(was.keeper), link.memory, was.facts, origins)):
        link.keep(keeper)
    for each in was.regions:
        request = DmaMap(each.flags, each.offset, each.address, each.size)
        descriptor = None if each.file is None else heir.file(each.file)
        link.memory.add(request, descriptor).at_device = AtDevice(each.at_device)
    link.memory.generation = was.generation
    for index, vector, file in was.vectors:
        link.interrupts.assign(index, vector, heir.file(file))
    link.service.vmm_max_bytes = was.vmm_max_bytes
    for asked in was.questions:
        back = twin if asked.by_twin else link.relay.to_device
        link.relay.expect(asked.ours, asked.theirs, back)
    link.deferred.take(was.deferred, was.counters)
    link.enter(custody.state, shut=custody.shut, vmm_starts=was.vmm_starts)
    link.gate.dropped = was.dropped
    link.migration_touched = was.migration_touched
    link.state_came = was.state_came
    link.comebacks = was.comebacks


def to_bytes(state: State) -> bytes:
    return encode_plain(pack(state).fields)


def from_bytes(data: bytes) -> State:
    """Raises `ShapeError`, `ControlProtocolError`."""
    return unpack(State, ControlMessage(decode_plain(data), b"", []))
