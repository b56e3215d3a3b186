"""DMA by message, as whole messages: the gateway serves it without taking one apart.

Source: vfio-user specification, VFIO_USER_DMA_READ and _DMA_WRITE.
"""

import struct
from dataclasses import dataclass
from typing import Final, Self

from sync.vfio_user.access import ADDRESS_LIMIT
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.wire import unpack_start

_DMA_ACCESS: Final = struct.Struct("<QQ")
_DMA_ACCESS_SHORT: Final = struct.Struct("<QI")


@dataclass(frozen=True, slots=True)
class DmaAccess:
    """DMA_READ and DMA_WRITE, request and reply: `count` bytes at a DMA address of the client.

    A write request and a read reply carry `data` of exactly `count` bytes, a read request and a
    write reply carry none.
    """

    address: int
    count: int
    data: bytes = b""

    def pack(self) -> bytes:
        return _DMA_ACCESS.pack(self.address, self.count) + self.data

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        # The specification gives the count of a write reply 4 bytes, QEMU and libvfio-user send 8.
        if len(body) == _DMA_ACCESS_SHORT.size:
            address, count = _DMA_ACCESS_SHORT.unpack(body)
        else:
            address, count = unpack_start(_DMA_ACCESS, body, "DMA access")
        data = bytes(body[_DMA_ACCESS.size :])
        if data and len(data) != count:
            raise ProtocolError(f"DMA access of {count} bytes carries {len(data)}")
        if address + count > ADDRESS_LIMIT:
            raise ProtocolError(f"DMA access of {count:#x} bytes at {address:#x}")
        return cls(address, count, data)
