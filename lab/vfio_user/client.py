"""The client library: blocking, usable from several threads.

Owns one connection. Memory and interrupts stay with the caller, who passes descriptors, or answers
the device's DMA messages in callbacks. Source: vfio-user specification.
"""

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from errno import EINVAL, EIO, ENOTSUP
from pathlib import Path
from typing import Final, Self, TypeVar

from lab.vfio_user.access import DmaAccess
from lab.vfio_user.channel import Channel
from sync.vfio_user.framing import Message, close_fds
from sync.vfio_user.protocol import (
    HEADER_BYTES,
    MAJOR,
    MINOR,
    Capabilities,
    Command,
    DeviceInfo,
    DeviceInfoRequest,
    Disconnected,
    DmaMap,
    DmaUnmap,
    Feature,
    IrqInfo,
    IrqInfoRequest,
    MigData,
    ProtocolError,
    RegionAccess,
    RegionInfo,
    RegionInfoRequest,
    SetIrqs,
    TwinSocket,
    Version,
    VfioUserError,
    WriteMulti,
    WriteMultiReply,
    message_limit_bytes,
)

CLIENT_CAPABILITIES: Final = Capabilities(
    max_msg_fds=16, twin_socket=TwinSocket(supported=True), write_multiple=True
)

_ARGSZ: Final = struct.Struct("<I")
_R = TypeVar("_R")
_logger = logging.getLogger(__name__)


class Client:
    """A connection to a device.

    `on_dma_read(address, count)` returns bytes and `on_dma_write(address, data)` stores them, for
    regions mapped without a descriptor; both are called in a thread of the client, which `close`
    waits for, and may raise `VfioUserError`. Without them the device's DMA messages are refused.
    `timeout_s` bounds connecting and negotiating.

    Constructing raises OSError if there is no server. All methods raise `VfioUserError` when the
    request is refused, `Disconnected` when the connection is gone, `ProtocolError` when the server
    breaks the protocol (the connection is closed then), ValueError for a transfer of more than
    `max_transfer_bytes`.
    """

    server_capabilities: Capabilities
    """What the server answered."""

    max_transfer_bytes: int
    """The largest `count` of a transfer that both sides accept."""

    def __init__(
        self,
        socket_path: str | Path,
        *,
        capabilities: Capabilities = CLIENT_CAPABILITIES,
        on_dma_read: Callable[[int, int], bytes] | None = None,
        on_dma_write: Callable[[int, bytes], None] | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        self._on_dma_read = on_dma_read
        self._on_dma_write = on_dma_write
        serves_dma = on_dma_read is not None or on_dma_write is not None
        if not serves_dma:
            capabilities = replace(capabilities, twin_socket=None)
        self._limit_bytes = message_limit_bytes(capabilities.max_data_xfer_size)
        self._twin: Channel | None = None
        self._dma_thread: threading.Thread | None = None
        self._main = Channel(
            _connected(socket_path, timeout_s),
            self._limit_bytes,
            capabilities.max_msg_fds,
            serves=serves_dma,
        )
        try:
            self._main.limit_time(timeout_s)
            self._negotiate(capabilities)
            self._main.limit_time(None)
        except BaseException:
            self.close()
            raise
        if serves_dma:
            self._dma_thread = threading.Thread(
                target=self._serve_dma, name="vfio-user-dma", daemon=True
            )
            self._dma_thread.start()

    def device_info(self) -> DeviceInfo:
        request = DeviceInfoRequest().pack()
        return self._ask(Command.DEVICE_GET_INFO, request, DeviceInfo.unpack)

    def region_info(self, index: int) -> RegionInfo:
        """Return the description of a region, capabilities included."""
        info, fd = self.region_mapping(index)
        if fd is not None:
            os.close(fd)
        return info

    def region_mapping(self, index: int) -> tuple[RegionInfo, int | None]:
        """Return a region's description and the descriptor to map it, which the caller owns."""
        info, fds = self._ask_sized(
            Command.DEVICE_GET_REGION_INFO,
            RegionInfoRequest(index).argsz,
            lambda argsz: RegionInfoRequest(index, argsz).pack(),
            RegionInfo.unpack,
        )
        fd = fds.pop(0) if fds and info.index == index else None
        close_fds(fds)
        if info.index != index:
            raise self._broken(f"information on region {info.index} for {index}")
        return info, fd

    def irq_info(self, index: int) -> IrqInfo:
        info = self._ask(Command.DEVICE_GET_IRQ_INFO, IrqInfoRequest(index).pack(), IrqInfo.unpack)
        if info.index != index:
            raise self._broken(f"information on interrupt type {info.index} for {index}")
        return info

    def set_irqs(self, request: SetIrqs, fds: Sequence[int] = ()) -> None:
        """Set an interrupt action; descriptors stay the caller's own.

        Split into several requests if the server takes fewer descriptors with one message.
        """
        if not fds:
            self._ask(Command.DEVICE_SET_IRQS, request.pack(), _nothing)
            return
        step = self.server_capabilities.max_msg_fds
        if not step or len(fds) != request.count:
            raise ValueError(
                f"{len(fds)} descriptors for {request.count} interrupts, {step} a time"
            )
        for first in range(0, len(fds), step):
            part = fds[first : first + step]
            message = replace(request, start=request.start + first, count=len(part))
            self._ask(Command.DEVICE_SET_IRQS, message.pack(), _nothing, part)

    def dma_map(self, region: DmaMap, fd: int | None = None) -> None:
        """Make a region known to the device; the descriptor stays the caller's own."""
        self._ask(Command.DMA_MAP, region.pack(), _nothing, () if fd is None else (fd,))

    def dma_unmap(self, request: DmaUnmap) -> None:
        """Take a region back; on return the device does not use it any more."""
        self._ask(Command.DMA_UNMAP, request.pack(), DmaUnmap.unpack)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        self._check_transfer(count)
        if not count:
            return b""
        request = RegionAccess(offset, region, count)
        reply = self._ask(Command.REGION_READ, request.pack(), RegionAccess.unpack)
        if (reply.offset, reply.region, len(reply.data)) != (offset, region, count):
            raise self._broken("REGION_READ reply does not answer the request")
        return reply.data

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write to a region. `posted`: do not wait, and learn nothing of a refusal."""
        self._check_transfer(len(data))
        if not data:
            return
        request = RegionAccess(offset, region, len(data), data).pack()
        if posted:
            self._main.post(Command.REGION_WRITE, request)
            return
        reply = self._ask(Command.REGION_WRITE, request, RegionAccess.unpack)
        if (reply.offset, reply.region, reply.count) != (offset, region, len(data)):
            raise self._broken("REGION_WRITE reply does not answer the request")

    def write_multi(self, writes: Sequence[RegionAccess], *, posted: bool = False) -> int:
        """Write up to 8 bytes each, in order; return how many were completed (posted: all).

        Raises ValueError if the server does not support it (`write_multiple`).
        """
        if not self.server_capabilities.write_multiple:
            raise ValueError("the server does not support REGION_WRITE_MULTI")
        request = WriteMulti(tuple(writes)).pack()
        self._check_transfer(len(request))
        if posted:
            self._main.post(Command.REGION_WRITE_MULTI, request)
            return len(writes)
        reply = self._ask(Command.REGION_WRITE_MULTI, request, WriteMultiReply.unpack)
        if reply.completed > len(writes):
            raise self._broken(f"{reply.completed} of {len(writes)} writes completed")
        return reply.completed

    def reset(self) -> None:
        """Reset the device."""
        self._ask(Command.DEVICE_RESET, b"", _nothing)

    def feature(self, request: Feature) -> Feature:
        """Get, set or probe a feature; return the reply, whose `data` is complete."""
        reply, fds = self._ask_sized(
            Command.DEVICE_FEATURE,
            request.argsz,
            lambda argsz: replace(request, argsz=argsz).pack(),
            Feature.unpack,
        )
        close_fds(fds)
        if reply.flags != request.flags:
            raise self._broken("DEVICE_FEATURE reply does not answer the request")
        return reply

    def mig_read(self, size: int) -> bytes:
        """Return `size` bytes of migration data; less if these are the last."""
        self._check_transfer(size)
        reply = self._ask(Command.MIG_DATA_READ, MigData(size).pack(), MigData.unpack)
        if len(reply.data) != reply.size or reply.size > size:
            raise self._broken(f"{reply.size} bytes of migration data for {size}")
        return reply.data

    def mig_write(self, data: bytes) -> None:
        """Pass on the next bytes of migration data."""
        self._check_transfer(len(data))
        self._ask(Command.MIG_DATA_WRITE, MigData(len(data), data).pack(), _nothing)

    def close(self) -> None:
        """End the connection; whatever waits on it gets `Disconnected`. May be called again."""
        channels = [self._main] if self._twin is None else [self._main, self._twin]
        for channel in channels:
            channel.fail(Disconnected("connection closed by this side"))
        if self._dma_thread not in (None, threading.current_thread()):
            self._dma_thread.join()
        for channel in channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _negotiate(self, proposed: Capabilities) -> None:
        reply = self._main.call(Command.VERSION, Version(capabilities=proposed).pack())
        try:
            version = self._understood(Version.unpack, reply.body)
            if version.major != MAJOR or version.minor > MINOR:
                raise self._broken(f"server answers version {version.major}.{version.minor}")
            agreed = version.capabilities
            if agreed.has_twin_socket and agreed.twin_socket is not None:
                self._open_twin(proposed, agreed.twin_socket.fd_index, reply.fds)
        finally:
            close_fds(reply.fds)
        self.server_capabilities = agreed
        self.max_transfer_bytes = min(proposed.max_data_xfer_size, agreed.max_data_xfer_size)

    def _open_twin(self, proposed: Capabilities, index: int | None, fds: list[int]) -> None:
        if not proposed.has_twin_socket or index is None or index >= len(fds):
            raise self._broken("server turns twin-socket mode on without asking or descriptor")
        try:
            twin = socket.socket(fileno=fds[index])
        except OSError as error:
            raise self._broken("twin socket is no socket") from error
        del fds[index]
        twin.settimeout(None)
        self._twin = Channel(twin, self._limit_bytes, 0)
        self._main.serves = False

    def _ask(
        self,
        command: Command,
        request: bytes,
        unpack: Callable[[bytes], _R],
        fds: Sequence[int] = (),
    ) -> _R:
        reply = self._main.call(command, request, fds)
        close_fds(reply.fds)
        return self._understood(unpack, reply.body)

    def _ask_sized(
        self,
        command: Command,
        argsz: int,
        request: Callable[[int], bytes],
        unpack: Callable[[bytes], _R],
    ) -> tuple[_R, list[int]]:
        """Ask, and ask again if the reply was cut because `argsz` was too small for it."""
        while True:
            reply = self._main.call(command, request(argsz))
            try:
                answer = self._understood(unpack, reply.body)
            except ProtocolError:
                close_fds(reply.fds)
                raise
            (needed,) = _ARGSZ.unpack_from(reply.body)
            if needed <= len(reply.body):
                return answer, reply.fds
            close_fds(reply.fds)
            if not argsz < needed <= self._limit_bytes - HEADER_BYTES:
                raise self._broken(f"reply of {len(reply.body)} bytes wants {needed}")
            argsz = needed

    def _understood(self, unpack: Callable[[bytes], _R], body: bytes) -> _R:
        try:
            return unpack(body)
        except ProtocolError as error:
            self._main.fail(error)
            raise

    def _broken(self, reason: str) -> ProtocolError:
        """End the connection for this reason and return the error to raise."""
        error = ProtocolError(reason)
        self._main.fail(error)
        return error

    def _check_transfer(self, count: int) -> None:
        if count > self.max_transfer_bytes:
            raise ValueError(f"{count} bytes in one transfer, limit is {self.max_transfer_bytes}")

    def _serve_dma(self) -> None:
        channel = self._twin or self._main
        try:
            while True:
                self._serve_dma_request(channel, channel.next_request())
        except (Disconnected, ProtocolError) as reason:
            # A device that cannot reach memory any more is of no use.
            self._main.fail(reason)

    def _serve_dma_request(self, channel: Channel, message: Message) -> None:
        close_fds(message.fds)
        header = message.header
        errno = 0
        try:
            body = self._access_memory(header.command, message.body)
        except VfioUserError as refusal:
            errno = refusal.errno or EIO
        except ProtocolError:
            errno = EINVAL
        except Exception:
            _logger.exception("DMA callback failed")
            errno = EIO
        if errno:
            channel.reply_error(header, errno)
        else:
            channel.reply(header, body)

    def _access_memory(self, command: int, body: bytes) -> bytes:
        if command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise VfioUserError(ENOTSUP)
        access = DmaAccess.unpack(body)
        if access.count > self.max_transfer_bytes:
            raise VfioUserError(EINVAL)
        if command == Command.DMA_READ:
            if access.data:
                raise ProtocolError("DMA_READ with data")
            if self._on_dma_read is None:
                raise VfioUserError(ENOTSUP)
            data = self._on_dma_read(access.address, access.count)
            if len(data) != access.count:
                raise RuntimeError(f"on_dma_read gave {len(data)} bytes for {access.count}")
            return DmaAccess(access.address, access.count, data).pack()
        if len(access.data) != access.count:
            raise ProtocolError("DMA_WRITE without its data")
        if self._on_dma_write is None:
            raise VfioUserError(ENOTSUP)
        self._on_dma_write(access.address, access.data)
        return DmaAccess(access.address, access.count).pack()


def _nothing(body: bytes) -> None:
    """Unpack a reply without a body."""
    if body:
        raise ProtocolError(f"reply with {len(body)} bytes, none expected")


def _connected(path: str | Path, timeout_s: float) -> socket.socket:
    """A stream socket connected to `path`, with that timeout. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock
