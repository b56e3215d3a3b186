"""Register writes of the VMM in passthrough, noted on their way to the device.

Sans-IO. A write is noted before the device can see it, and relayed as it is. Not owned: what is
made of a note (`keeper`), and states in which accesses are more than relayed (`traps`).
"""

import struct
from typing import Protocol

from sync.gateway.datapath.relay import Relay, VmmCommand
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.protocol import HEADER_BYTES, Command, WriteMulti

_ACCESS = struct.Struct("<QII")
_BODY = HEADER_BYTES + _ACCESS.size


class Note(Protocol):
    """Takes what the driver does."""

    def write(self, region: int, offset: int, data: bytes) -> None: ...

    def reset(self) -> None: ...


def notes(relay: Relay, note: Note) -> dict[int, VmmCommand]:
    """Commands that are noted and relayed. What is malformed the device refuses."""
    relay_command = relay.relay_command

    def write(message_id: int, flags: int, message: memoryview, descriptors: list[int]) -> None:
        if len(message) > _BODY:
            offset, region, count = _ACCESS.unpack_from(message, HEADER_BYTES)
            if len(message) == _BODY + count:
                note.write(region, offset, bytes(message[_BODY:]))
        relay_command(message_id, flags, message, descriptors)

    def write_multi(
        message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        try:
            for each in WriteMulti.unpack(message[HEADER_BYTES:]).writes:
                note.write(each.region, each.offset, bytes(each.data))
        except ProtocolError:
            pass
        relay_command(message_id, flags, message, descriptors)

    def reset(message_id: int, flags: int, message: memoryview, descriptors: list[int]) -> None:
        note.reset()
        relay_command(message_id, flags, message, descriptors)

    return {
        Command.REGION_WRITE: write,
        Command.REGION_WRITE_MULTI: write_multi,
        Command.DEVICE_RESET: reset,
    }
