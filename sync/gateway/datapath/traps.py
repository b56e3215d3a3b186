"""Register accesses of the VMM where they are more than relayed: captured, or gated.

Sans-IO. `Capture` (states mediated and stopped) executes everything and writes the journal. `Gate`
(standby, released, shut) keeps a device that does not own the guest from starting anything: reads
and configuration writes are executed, other writes and resets are dropped and counted (I4). In
standby they are acknowledged, for no guest runs yet; else they are refused, for one may, and
nothing is acknowledged that is not done. Either keeps the VMM's fingers off the device's migration
state. In passthrough neither is in the way.
"""

import errno
import struct
from collections.abc import Callable

from sync.gateway.datapath.deferred_reads import DeferredReads
from sync.gateway.datapath.journal import Entry, Journal
from sync.gateway.datapath.notes import Note
from sync.gateway.datapath.relay import Relay, VmmCommand
from sync.registers.record import Op
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.framing import close_fds
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    HEADER_BYTES,
    Command,
    PciRegion,
    RegionAccess,
    WriteMulti,
    WriteMultiReply,
)

_ACCESS = struct.Struct("<QII")
_BODY = HEADER_BYTES + _ACCESS.size
_MAX_REGION = 0xFFFF
"""A register operation record has 16 bits for the region."""
_MAX_CONFIG_WRITES = 256
"""In one REGION_WRITE_MULTI; a VMM sends configuration writes one by one."""
_LIMIT = 1 << 64
_REGISTER_BYTES = 8
_READ, _WRITE, _RESET = int(Op.READ), int(Op.WRITE), int(Op.RESET)

_MIGRATION = (Command.DEVICE_FEATURE, Command.MIG_DATA_READ, Command.MIG_DATA_WRITE)


class _Read:
    """A captured read under way; called with the device's reply."""

    __slots__ = ("_deferred", "_entry", "_journal", "_message_id", "_relay")

    def __init__(
        self, relay: Relay, journal: Journal, deferred: DeferredReads, message_id: int, entry: Entry
    ) -> None:
        self._relay = relay
        self._journal = journal
        self._deferred = deferred
        self._message_id = message_id
        self._entry = entry

    def __call__(self, error: int, reply: memoryview, descriptors: list[int]) -> None:
        close_fds(descriptors)
        entry = self._entry
        if error or len(reply) != _BODY + entry.size:
            # What is no answer to this read is the VMM's to judge, as in passthrough.
            self._journal.finish(entry, failed=True)
        else:
            if self._deferred:
                self._deferred.deliver(entry.region, entry.offset, reply[_BODY:])
            self._journal.finish(entry, data=bytes(reply[_BODY:]))
        self._relay.pass_back(self._message_id, reply, [])


class Capture:
    """Commands that write the journal. `max_bytes` is the largest access. `note`, if there is one,
    hears of each write as it does in passthrough."""

    def __init__(
        self, relay: Relay, journal: Journal, deferred: DeferredReads, max_bytes: int
    ) -> None:
        self._relay = relay
        self._journal = journal
        self._deferred = deferred
        self._max_bytes = max_bytes
        self.note: Note | None = None
        self.commands: dict[int, VmmCommand] = {
            Command.REGION_READ: self._read,
            Command.REGION_WRITE: self._write,
            Command.REGION_WRITE_MULTI: self._write_multi,
            Command.DEVICE_RESET: self._reset,
            **refusals(relay),
        }

    def _read(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        offset, region, count = _access(message)
        relay = self._relay
        if not 0 < count <= self._max_bytes or region > _MAX_REGION or offset + count > _LIMIT:
            relay.answer(message_id, flags, Command.REGION_READ, error=errno.EINVAL)
        elif flags & FLAG_NO_REPLY:
            raise ProtocolError("a read that wants no reply")
        else:
            entry = self._journal.begin(_READ, region, offset, count)
            relay.forward(
                message_id,
                message,
                descriptors,
                _Read(relay, self._journal, self._deferred, message_id, entry),
            )
            return
        close_fds(descriptors)

    def _write(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        if len(message) < _BODY:
            raise ProtocolError(f"REGION_WRITE of {len(message)} bytes")
        offset, region, count = _ACCESS.unpack_from(message, HEADER_BYTES)
        if len(message) != _BODY + count:
            raise ProtocolError(f"a write of {count} bytes in a message of {len(message)}")
        relay = self._relay
        if not 0 < count <= self._max_bytes or region > _MAX_REGION or offset + count > _LIMIT:
            relay.answer(message_id, flags, Command.REGION_WRITE, error=errno.EINVAL)
            close_fds(descriptors)
            return
        data = bytes(message[_BODY:])
        if self.note is not None:
            self.note.write(region, offset, data)
        if flags & FLAG_NO_REPLY:
            self._journal.posted(region, offset, data)
            relay.post(message, descriptors)
            return
        entry = self._journal.begin(_WRITE, region, offset, count, data)
        self._forward(message_id, message, descriptors, self._finish(entry))

    def _write_multi(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        writes = WriteMulti.unpack(message[HEADER_BYTES:]).writes
        relay = self._relay
        if any(
            not write.count or write.region > _MAX_REGION or write.offset + write.count > _LIMIT
            for write in writes
        ):
            relay.answer(message_id, flags, Command.REGION_WRITE_MULTI, error=errno.EINVAL)
            close_fds(descriptors)
            return
        journal = self._journal
        if self.note is not None:
            for write in writes:
                self.note.write(write.region, write.offset, bytes(write.data))
        if flags & FLAG_NO_REPLY:
            for write in writes:
                journal.posted(write.region, write.offset, write.data)
            relay.post(message, descriptors)
            return
        entries = [
            journal.begin(_WRITE, write.region, write.offset, write.count, write.data)
            for write in writes
        ]

        def finish(error: int, reply: memoryview) -> None:
            try:
                done = 0 if error else WriteMultiReply.unpack(reply[HEADER_BYTES:]).completed
            except ProtocolError:
                done = 0
            for number, entry in enumerate(entries):
                journal.finish(entry, failed=number >= done)

        self._forward(message_id, message, descriptors, finish)

    def _reset(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        finish = self._finish(self._journal.begin(_RESET, 0, 0, 0))
        if self.note is not None:
            self.note.reset()
        if flags & FLAG_NO_REPLY:

            def answered(error: int, reply: memoryview, more: list[int]) -> None:
                close_fds(more)
                finish(error, reply)

            self._relay.snoop(flags, message, descriptors, answered)
        else:
            self._forward(message_id, message, descriptors, finish)

    def _finish(self, entry: Entry) -> Callable[[int, memoryview], None]:
        def finish(error: int, reply: memoryview) -> None:
            self._journal.finish(entry, failed=bool(error))

        return finish

    def _forward(
        self,
        message_id: int,
        message: memoryview,
        descriptors: list[int],
        finish: Callable[[int, memoryview], None],
    ) -> None:
        def answered(error: int, reply: memoryview, more: list[int]) -> None:
            close_fds(more)
            finish(error, reply)
            self._relay.pass_back(message_id, reply, [])

        self._relay.forward(message_id, message, descriptors, answered)


class Gate:
    """Commands of a VMM whose device must not start anything. `dropped` counts what was not
    executed: writes and resets."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.note: Note | None = None
        self.dropped = 0
        self.acknowledge = True
        """Whether what is dropped is answered as if it were done."""
        self.acknowledge_reset = True
        """Whether a reset is, too: a VMM that starts resets what has done nothing for it."""
        self.commands: dict[int, VmmCommand] = {
            Command.REGION_WRITE: self._write,
            Command.REGION_WRITE_MULTI: self._write_multi,
            Command.DEVICE_RESET: self._reset,
            **refusals(relay),
        }

    def _write(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        access = RegionAccess.unpack(message[HEADER_BYTES:])
        if access.region == PciRegion.CONFIG:
            if self.note is not None:
                self.note.write(access.region, access.offset, bytes(access.data))
            self._relay.relay_command(message_id, flags, message, descriptors)
            return
        close_fds(descriptors)
        self.dropped += 1
        body = RegionAccess(access.offset, access.region, access.count).pack()
        self._drop(message_id, flags, Command.REGION_WRITE, body)

    def _write_multi(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        writes = WriteMulti.unpack(message[HEADER_BYTES:]).writes
        close_fds(descriptors)
        executed = [write for write in writes if write.region == PciRegion.CONFIG]
        if len(executed) > _MAX_CONFIG_WRITES:
            self._relay.answer(message_id, flags, Command.REGION_WRITE_MULTI, error=errno.EINVAL)
            return
        for write in executed:
            if self.note is not None:
                self.note.write(write.region, write.offset, bytes(write.data))
            self._relay.ask(Command.REGION_WRITE, write.pack(), (), _ignore)
        self.dropped += len(writes) - len(executed)
        body = WriteMultiReply(len(writes)).pack()
        if len(executed) == len(writes):
            self._relay.answer(message_id, flags, Command.REGION_WRITE_MULTI, body)
        else:
            self._drop(message_id, flags, Command.REGION_WRITE_MULTI, body)

    def _reset(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        close_fds(descriptors)
        self.dropped += 1
        if self.acknowledge_reset:
            self._relay.answer(message_id, flags, Command.DEVICE_RESET)
        else:
            self._refuse(message_id, flags, Command.DEVICE_RESET)

    def _drop(self, message_id: int, flags: int, command: Command, body: bytes) -> None:
        if self.acknowledge:
            self._relay.answer(message_id, flags, command, body)
        else:
            self._refuse(message_id, flags, command)

    def _refuse(self, message_id: int, flags: int, command: Command) -> None:
        self._relay.answer(message_id, flags, command, error=errno.EACCES)


def reads(relay: Relay, deferred: DeferredReads, *, at_rest: bool) -> dict[int, VmmCommand]:
    """Commands by which the guest gets deferred values with what it reads from the device.

    A device `at_rest` may refuse every access (linux/vfio.h, VFIO_DEVICE_STATE_STOP_COPY). A VMM
    deasserts INTx only with a read of a BAR that works, so there it reads zeros: its guest, which
    could take them for something, is paused.
    """

    def read(message_id: int, flags: int, message: memoryview, descriptors: list[int]) -> None:
        offset, region, count = _access(message)
        if flags & FLAG_NO_REPLY:
            raise ProtocolError("a read that wants no reply")

        def answered(error: int, reply: memoryview, more: list[int]) -> None:
            close_fds(more)
            if error and at_rest and region != PciRegion.CONFIG and count <= _REGISTER_BYTES:
                zeros = RegionAccess(offset, region, count, bytes(count)).pack()
                relay.answer(message_id, flags, Command.REGION_READ, zeros)
                return
            if not error and len(reply) > _BODY:
                deferred.deliver(region, offset, reply[_BODY:])
            relay.pass_back(message_id, reply, [])

        relay.forward(message_id, message, descriptors, answered)

    return {Command.REGION_READ: read}


class Watch:
    """Commands of a guest that has just come: relayed, and counted, so that one can tell whether
    anything was asked of the device."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.writes = 0
        """Of registers beside configuration space."""
        self.refused = 0
        """Accesses that the device has answered with an error."""
        self.commands: dict[int, VmmCommand] = {
            Command.REGION_READ: self._relay_access,
            Command.REGION_WRITE: self._write,
            Command.REGION_WRITE_MULTI: self._write_multi,
        }

    def _write(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        self.writes += RegionAccess.unpack(message[HEADER_BYTES:]).region != PciRegion.CONFIG
        self._relay_access(message_id, flags, message, descriptors)

    def _write_multi(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        writes = WriteMulti.unpack(message[HEADER_BYTES:]).writes
        self.writes += sum(write.region != PciRegion.CONFIG for write in writes)
        self._relay_access(message_id, flags, message, descriptors)

    def _relay_access(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        if flags & FLAG_NO_REPLY:
            self._relay.to_device(message, descriptors)
            return

        def answered(error: int, reply: memoryview, more: list[int]) -> None:
            self.refused += bool(error)
            self._relay.pass_back(message_id, reply, more)

        self._relay.forward(message_id, message, descriptors, answered)


def refusals(relay: Relay) -> dict[int, VmmCommand]:
    """Commands for the device's migration state, which is ours while a migration is under way."""

    def refusal(command: Command) -> VmmCommand:
        def refuse(
            message_id: int, flags: int, message: memoryview, descriptors: list[int]
        ) -> None:
            close_fds(descriptors)
            relay.answer(message_id, flags, command, error=errno.EBUSY)

        return refuse

    return {command: refusal(command) for command in _MIGRATION}


def _access(message: memoryview) -> tuple[int, int, int]:
    if len(message) != _BODY:
        raise ProtocolError(f"a register access of {len(message)} bytes")
    offset, region, count = _ACCESS.unpack_from(message, HEADER_BYTES)
    return offset, region, count


def _ignore(error: int, reply: memoryview, descriptors: list[int]) -> None:
    close_fds(descriptors)
