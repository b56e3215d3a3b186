"""The device's access to guest memory by message: DMA_READ and DMA_WRITE.

Sans-IO. Answered from our own mapping where the region came with a descriptor: that spares the VMM
the message (it may be unable to answer while a vCPU waits for a register), and it makes the writes
trackable. A region without one is the VMM's to answer, and its own to track.
Source: vfio-user, VFIO_USER_DMA_READ and VFIO_USER_DMA_WRITE.
"""

import errno
import struct
from collections.abc import Sequence

from sync.gateway.datapath.bitmap import DirtyBitmap
from sync.gateway.datapath.dma import DmaFault, DmaMemory
from sync.gateway.datapath.relay import Buffer, Relay, Send, error_reply
from sync.vfio_user.protocol import (
    FLAG_ERROR,
    FLAG_NO_REPLY,
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    Command,
    DmaFlags,
    encode_message,
)

_ACCESS = struct.Struct("<QQ")
_BODY = HEADER_BYTES + _ACCESS.size
_REPLY = struct.Struct(HEADER.format + "QQ")
_LIMIT = 1 << 64
_READ, _WRITE = int(Command.DMA_READ), int(Command.DMA_WRITE)
_PERMISSION = {_READ: int(DmaFlags.READ), _WRITE: int(DmaFlags.WRITE)}


class DmaService:
    """`max_bytes` of data in one message from the device, `vmm_max_bytes` in one to the VMM.

    While `bitmap` is set, what is written is marked in it.
    """

    def __init__(self, relay: Relay, memory: DmaMemory, max_bytes: int) -> None:
        self.relay = relay
        self._memory = memory
        self._max_bytes = max_bytes
        self.vmm_max_bytes = max_bytes
        self.bitmap: DirtyBitmap | None = None

    def handle(
        self, message_id: int, command: int, flags: int, message: memoryview, back: Send
    ) -> None:
        """Executes or relays a command of the device; whatever is wrong with it is an errno."""
        try:
            self._handle(message_id, command, flags, message, back)
        except DmaFault as fault:
            if not flags & FLAG_NO_REPLY:
                back(error_reply(message_id, command, fault.errno), ())

    def _handle(
        self, message_id: int, command: int, flags: int, message: memoryview, back: Send
    ) -> None:
        if command not in _PERMISSION:
            raise DmaFault(errno.ENOTSUP)
        if len(message) < _BODY:
            raise DmaFault(errno.EINVAL)
        address, count = _ACCESS.unpack_from(message, HEADER_BYTES)
        carried = count if command == _WRITE else 0
        if not 0 < count <= self._max_bytes or address + count > _LIMIT:
            raise DmaFault(errno.EINVAL)
        if len(message) != _BODY + carried:
            raise DmaFault(errno.EINVAL)
        if self._memory.find(address).descriptor is None:
            self._pass_on(message_id, command, flags, address, count, message, back)
            return
        if command == _READ:
            data = self._memory.read(address, count)
        else:
            self._memory.write(address, message[_BODY:])
            if self.bitmap is not None:
                self.bitmap.mark(address, count)
            data = b""
        if not flags & FLAG_NO_REPLY:
            size = _REPLY.size + len(data)
            head = _REPLY.pack(message_id, command, size, FLAG_REPLY, 0, address, count)
            back(head + data, ())

    def _pass_on(
        self,
        message_id: int,
        command: int,
        flags: int,
        address: int,
        count: int,
        message: memoryview,
        back: Send,
    ) -> None:
        pieces = self._memory.spans(address, count, _PERMISSION[command])
        if any(region.descriptor is not None for region, _, _ in pieces):
            raise DmaFault(errno.EINVAL)
        if count > self.vmm_max_bytes:
            data = b"" if command == _READ else bytes(message[_BODY:])
            _Pieces(self, message_id, command, flags, address, count, data, back).go_on()
        elif not self.relay.forward_to_vmm(message_id, flags, message, back):
            raise DmaFault(errno.EBUSY)


class _Pieces:
    """An access that is too large for one message to the VMM, piece after piece."""

    def __init__(
        self,
        service: DmaService,
        message_id: int,
        command: int,
        flags: int,
        address: int,
        count: int,
        data: bytes,
        back: Send,
    ) -> None:
        self._service = service
        self._message_id = message_id
        self._command = command
        self._flags = flags
        self._address = address
        self._count = count
        self._data = data
        self._back = back
        self._done = 0
        self._read: list[bytes] = []

    def go_on(self) -> None:
        """Sends the next piece, or the reply once all are through. Raises `DmaFault` (EBUSY)."""
        size = min(self._service.vmm_max_bytes, self._count - self._done)
        if not size:
            if not self._flags & FLAG_NO_REPLY:
                data = b"".join(self._read)
                head = (self._message_id, self._command, _REPLY.size + len(data), FLAG_REPLY, 0)
                self._back(_REPLY.pack(*head, self._address, self._count) + data, ())
            return
        body = _ACCESS.pack(self._address + self._done, size)
        body += self._data[self._done : self._done + size]
        message = memoryview(bytearray(encode_message(0, self._command, body)))
        if not self._service.relay.forward_to_vmm(0, 0, message, self._answered):
            raise DmaFault(errno.EBUSY)

    def _answered(self, reply: Buffer, descriptors: Sequence[int]) -> None:
        *_, flags, error = HEADER.unpack_from(reply)
        size = min(self._service.vmm_max_bytes, self._count - self._done)
        data = bytes(memoryview(reply)[_BODY:])
        try:
            if flags & FLAG_ERROR:
                raise DmaFault(error or errno.EIO)
            if self._command == _READ and len(data) != size:
                raise DmaFault(errno.EIO)
            self._read.append(data if self._command == _READ else b"")
            self._done += size
            self.go_on()
        except DmaFault as fault:
            if not self._flags & FLAG_NO_REPLY:
                self._back(error_reply(self._message_id, self._command, fault.errno), ())
