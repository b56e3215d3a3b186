"""The device's access to guest memory by message: DMA_READ and DMA_WRITE.

Sans-IO. Answered from our own mapping where the region came with a descriptor: that spares the VMM
the message (it may be unable to answer while a vCPU waits for a register), and it makes the writes
trackable. A region without one is the VMM's to answer, and its own to track.
Source: vfio-user, VFIO_USER_DMA_READ and VFIO_USER_DMA_WRITE.
"""

import errno
import struct

from sync.gateway.datapath.bitmap import DirtyBitmap
from sync.gateway.datapath.dma import DmaFault, DmaMemory
from sync.gateway.datapath.relay import Relay, Send, error_reply
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    Command,
    DmaFlags,
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
        self._relay = relay
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
        if count > self.vmm_max_bytes or any(
            region.descriptor is not None for region, _, _ in pieces
        ):
            raise DmaFault(errno.EINVAL)
        if not self._relay.forward_to_vmm(message_id, flags, message, back):
            raise DmaFault(errno.EBUSY)
