"""VERSION, request and reply: protocol version and capabilities (JSON).

Source: vfio-user specification, section VFIO_USER_VERSION. Which capabilities a session ends up
with is `Capabilities.accept`; acting on them is the business of either end.
"""

import json
import struct
from dataclasses import dataclass
from typing import Any, Final, Self

from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.wire import DEFAULT_MAX_DATA_XFER_BYTES, unpack_start

MAJOR: Final = 0
MINOR: Final = 1

VERSION_DATA_MAX_BYTES: Final = 16384
"""QEMU and libvfio-user send some 300 bytes of JSON; more than this is no capability list."""

_VERSION: Final = struct.Struct("<HH")
_LARGEST_NUMBER: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class TwinSocket:
    """Server-to-client commands on a socket of their own.

    `fd_index` (reply only) tells which descriptor of the message is the client's end.
    """

    supported: bool = False
    fd_index: int | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the sender of a VERSION message can do; the defaults are the specification's.

    `max_msg_fds`: descriptors that the sender can receive in one message.
    `max_data_xfer_size`: bytes of data in one transfer.
    `max_dma_maps`: DMA regions at a time.
    `pgsizes`: page sizes of DMA regions, or'ed together, in bytes.
    """

    max_msg_fds: int = 1
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_BYTES
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    twin_socket: TwinSocket | None = None
    write_multiple: bool = False

    @property
    def has_twin_socket(self) -> bool:
        return self.twin_socket is not None and self.twin_socket.supported

    def accept(self, proposed: "Capabilities") -> "Capabilities":
        """Return a server's answer to a client's proposal: no more than either side can do.

        `max_msg_fds` says what this side can receive and stays its own.
        Raises `ProtocolError` if the two have no page size in common.
        """
        pgsizes = self.pgsizes & proposed.pgsizes
        if not pgsizes:
            raise ProtocolError(f"no common page size in {proposed.pgsizes:#x}")
        twin = self.has_twin_socket and proposed.has_twin_socket
        return Capabilities(
            max_msg_fds=self.max_msg_fds,
            max_data_xfer_size=min(self.max_data_xfer_size, proposed.max_data_xfer_size),
            max_dma_maps=min(self.max_dma_maps, proposed.max_dma_maps),
            pgsizes=pgsizes,
            twin_socket=TwinSocket(True, 0) if twin else None,
            write_multiple=self.write_multiple and proposed.write_multiple,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the `capabilities` object of the version data."""
        members: dict[str, Any] = {
            "max_msg_fds": self.max_msg_fds,
            "max_data_xfer_size": self.max_data_xfer_size,
            "max_dma_maps": self.max_dma_maps,
            "pgsizes": self.pgsizes,
            "write_multiple": self.write_multiple,
        }
        if self.twin_socket is not None:
            twin: dict[str, Any] = {"supported": self.twin_socket.supported}
            if self.twin_socket.fd_index is not None:
                twin["fd_index"] = self.twin_socket.fd_index
            members["twin_socket"] = twin
        return members

    @classmethod
    def from_json(cls, members: dict[str, Any]) -> Self:
        """Read the `capabilities` object; what it does not know it passes over.

        Raises `ProtocolError` for a member of the wrong type or out of range.
        """
        twin = None
        if "twin_socket" in members:
            given = members["twin_socket"]
            if not isinstance(given, dict):
                raise ProtocolError("capability twin_socket is not an object")
            index = _number(given, "fd_index", 0, 0) if "fd_index" in given else None
            twin = TwinSocket(_boolean(given, "supported"), index)
        default = cls()
        return cls(
            max_msg_fds=_number(members, "max_msg_fds", default.max_msg_fds, 0),
            max_data_xfer_size=_number(
                members, "max_data_xfer_size", default.max_data_xfer_size, 1
            ),
            max_dma_maps=_number(members, "max_dma_maps", default.max_dma_maps, 0),
            pgsizes=_number(members, "pgsizes", default.pgsizes, 1),
            twin_socket=twin,
            write_multiple=_boolean(members, "write_multiple"),
        )


@dataclass(frozen=True, slots=True)
class Version:
    """VERSION request and reply."""

    major: int = MAJOR
    minor: int = MINOR
    capabilities: Capabilities = Capabilities()

    def pack(self) -> bytes:
        data = json.dumps({"capabilities": self.capabilities.to_json()}, separators=(",", ":"))
        return _VERSION.pack(self.major, self.minor) + data.encode() + b"\0"

    @classmethod
    def unpack(cls, body: bytes | memoryview) -> Self:
        major, minor = unpack_start(_VERSION, body, "VERSION")
        data = bytes(body[_VERSION.size :])
        if not data:
            return cls(major, minor)
        if len(data) > VERSION_DATA_MAX_BYTES:
            raise ProtocolError(f"version data of {len(data)} bytes")
        if data.find(b"\0") != len(data) - 1:
            raise ProtocolError("version data has to end with its only NUL")
        try:
            top = json.loads(data[:-1])
        except (ValueError, RecursionError) as error:
            raise ProtocolError("version data is not JSON") from error
        if not isinstance(top, dict):
            raise ProtocolError("version data is not an object")
        members = top.get("capabilities", {})
        if not isinstance(members, dict):
            raise ProtocolError("capabilities are not an object")
        return cls(major, minor, Capabilities.from_json(members))


def _number(members: dict[str, Any], name: str, default: int, least: int) -> int:
    value = members.get(name, default)
    if type(value) is not int or not least <= value <= _LARGEST_NUMBER:
        raise ProtocolError(f"capability {name} is not a number from {least}")
    return value


def _boolean(members: dict[str, Any], name: str) -> bool:
    value = members.get(name, False)
    if not isinstance(value, bool):
        raise ProtocolError(f"capability {name} is not a boolean")
    return value
