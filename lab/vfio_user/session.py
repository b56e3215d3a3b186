"""One client's connection at a server: negotiation, then every request checked and passed on.

Owns the channels and the DMA table of the connection. A request that is malformed or refused gets
an error reply; a stream that cannot be understood ends the connection.
Source: vfio-user specification.
"""

import logging
import socket
from collections.abc import Callable, Sequence
from errno import EINVAL, EIO, ENOTSUP, EPERM
from typing import Final

from lab.vfio_user.channel import Channel
from lab.vfio_user.device import Device
from lab.vfio_user.dma import DmaPort, DmaTable
from sync.vfio_user.framing import Message, close_fds
from sync.vfio_user.protocol import (
    HEADER_BYTES,
    MAJOR,
    MINOR,
    Capabilities,
    Command,
    DeviceInfoRequest,
    Disconnected,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureIndex,
    IrqInfo,
    IrqInfoRequest,
    IrqSet,
    LoggingReport,
    MigData,
    ProtocolError,
    RegionAccess,
    RegionFlags,
    RegionInfo,
    RegionInfoRequest,
    RegionIoFds,
    RegionIoFdsRequest,
    SetIrqs,
    UnmapFlags,
    Version,
    VfioUserError,
    WriteMulti,
    WriteMultiReply,
    message_limit_bytes,
)

NEGOTIATION_TIMEOUT_S: Final = 5.0
"""A client that says nothing must not keep the next one waiting."""

_logger = logging.getLogger(__name__)

_Reply = tuple[bytes, Sequence[int]]
_EMPTY: Final[_Reply] = (b"", ())
_FEATURE_FIXED_BYTES: Final = 8


class Session:
    """Serves one client: `run` returns when it has gone."""

    def __init__(self, sock: socket.socket, device: Device, capabilities: Capabilities) -> None:
        self._device = device
        self._own = capabilities
        self._limit_bytes = message_limit_bytes(capabilities.max_data_xfer_size)
        self._main = Channel(sock, self._limit_bytes, capabilities.max_msg_fds)
        self._twin: Channel | None = None
        self._agreed = capabilities
        self._client_max_fds = 1
        self._dma = DmaTable(0, 1)
        self._regions: list[RegionInfo] = []
        self._irqs: list[IrqInfo] = []
        self._handlers: dict[int, Callable[[Message], _Reply]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
            Command.REGION_WRITE_MULTI: self._write_multi,
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._migration_read,
            Command.MIG_DATA_WRITE: self._migration_write,
        }

    def shutdown(self) -> None:
        """End the connection. Takes no lock: it may be called from a signal handler."""
        self._main.shutdown()

    def run(self) -> None:
        """Negotiate, then serve requests until the client goes or breaks the protocol."""
        attached = False
        try:
            dma = self._negotiate()
            self._regions, self._irqs = self._describe()
            attached = True
            self._device.attached(dma)
            while True:
                self._serve(self._main.next_request())
        except Disconnected as reason:
            _logger.debug("client has gone: %s", reason)
        except ProtocolError as reason:
            _logger.warning("client dropped: %s", reason)
        finally:
            self._release(attached)

    def _release(self, attached: bool) -> None:
        # The device's threads must stop waiting for the client before the device can let go of it.
        gone = Disconnected("the client has gone")
        self._main.fail(gone)
        if self._twin is not None:
            self._twin.fail(gone)
        try:
            if attached:
                self._device.detached()
        finally:
            if self._twin is not None:
                self._twin.close()
            self._main.close()

    def _negotiate(self) -> DmaPort:
        self._main.limit_time(NEGOTIATION_TIMEOUT_S)
        request = self._main.next_request()
        close_fds(request.fds)
        try:
            if request.header.command != Command.VERSION:
                raise ProtocolError("the first message is not VERSION")
            proposed = Version.unpack(request.body)
            if proposed.major != MAJOR:
                raise ProtocolError(f"protocol version {proposed.major} is not supported")
            agreed = self._own.accept(proposed.capabilities)
        except ProtocolError:
            self._main.reply_error(request.header, EINVAL)
            raise
        self._agreed = agreed
        self._client_max_fds = proposed.capabilities.max_msg_fds
        self._dma = DmaTable(agreed.max_dma_maps, agreed.pgsizes & -agreed.pgsizes)
        reply = Version(MAJOR, min(MINOR, proposed.minor), agreed).pack()
        if agreed.has_twin_socket:
            self._reply_with_twin(request, reply)
        else:
            self._main.reply(request.header, reply)
        self._main.limit_time(None)
        channel = self._twin or self._main
        return DmaPort(channel, self._dma, agreed.max_data_xfer_size, self._main)

    def _reply_with_twin(self, request: Message, reply: bytes) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._twin = Channel(ours, self._limit_bytes, 0, serves=False)
            self._main.reply(request.header, reply, [theirs.fileno()])

    def _describe(self) -> tuple[list[RegionInfo], list[IrqInfo]]:
        info = self._device.device_info()
        regions = [self._device.region_info(index) for index in range(info.num_regions)]
        return regions, [self._device.irq_info(index) for index in range(info.num_irqs)]

    def _serve(self, message: Message) -> None:
        header = message.header
        errno = 0
        body, fds = _EMPTY
        try:
            handler = self._handlers.get(header.command)
            if handler is None:
                raise VfioUserError(ENOTSUP, f"command {header.command}")
            body, fds = handler(message)
            if HEADER_BYTES + len(body) > self._limit_bytes:
                raise VfioUserError(EINVAL, f"reply of {len(body)} bytes")
        except VfioUserError as refusal:
            _logger.debug("command %d refused: %s", header.command, refusal)
            errno = refusal.errno or EIO
        except ProtocolError as reason:
            _logger.debug("command %d malformed: %s", header.command, reason)
            errno = EINVAL
        except Disconnected:
            raise
        except Exception:
            _logger.exception("device failed on command %d", header.command)
            errno = EIO
        finally:
            close_fds(message.fds)
        if errno:
            self._main.reply_error(header, errno)
        else:
            self._main.reply(header, body, fds)

    def _region_read(self, message: Message) -> _Reply:
        access = RegionAccess.unpack(message.body)
        if access.data:
            raise ProtocolError("REGION_READ with data")
        self._check_access(access, RegionFlags.READ)
        if not access.count:
            return message.body, ()
        data = self._device.region_read(access.region, access.offset, access.count)
        if len(data) != access.count:
            raise RuntimeError(f"device returned {len(data)} bytes for {access.count}")
        return message.body + data, ()

    def _region_write(self, message: Message) -> _Reply:
        access = RegionAccess.unpack(message.body)
        if len(access.data) != access.count:
            raise ProtocolError("REGION_WRITE without its data")
        self._check_access(access, RegionFlags.WRITE)
        if access.count:
            self._device.region_write(access.region, access.offset, access.data)
        return message.body[: len(message.body) - access.count], ()

    def _write_multi(self, message: Message) -> _Reply:
        if not self._agreed.write_multiple:
            raise VfioUserError(ENOTSUP, "write_multiple was not agreed on")
        completed = 0
        for access in WriteMulti.unpack(message.body).writes:
            try:
                self._check_access(access, RegionFlags.WRITE)
                if access.count:
                    self._device.region_write(access.region, access.offset, access.data)
            except VfioUserError:
                if not completed:
                    raise
                break
            completed += 1
        return WriteMultiReply(completed).pack(), ()

    def _check_access(self, access: RegionAccess, flag: RegionFlags) -> None:
        if access.count > self._own.max_data_xfer_size:
            raise VfioUserError(EINVAL, f"transfer of {access.count} bytes")
        if access.region >= len(self._regions):
            raise VfioUserError(EINVAL, f"region {access.region} does not exist")
        region = self._regions[access.region]
        if access.offset + access.count > region.size:
            raise VfioUserError(EINVAL, f"access beyond region {access.region}")
        if not region.flags & flag:
            raise VfioUserError(EPERM, f"region {access.region} does not allow this")

    def _dma_map(self, message: Message) -> _Reply:
        region = DmaMap.unpack(message.body)
        if len(message.fds) > 1:
            raise ProtocolError("DMA_MAP with more than one descriptor")
        self._dma.check(region)
        # Before the device knows: it may start DMA the moment that it does.
        self._dma.add(region)
        try:
            self._device.dma_map(region, message.fds[0] if message.fds else None)
        except BaseException:
            self._dma.remove(region)
            raise
        message.fds.clear()
        return _EMPTY

    def _dma_unmap(self, message: Message) -> _Reply:
        request = DmaUnmap.unpack(message.body)
        if request.flags & UnmapFlags.ALL:
            regions = self._dma.regions
        else:
            regions = (self._dma.find(request.address, request.size),)
        for region in regions:
            self._device.dma_unmap(DmaUnmap(0, region.address, region.size))
            self._dma.remove(region)
        return message.body, ()

    def _device_info(self, message: Message) -> _Reply:
        DeviceInfoRequest.unpack(message.body)
        return self._device.device_info().pack(), ()

    def _region_info(self, message: Message) -> _Reply:
        request = RegionInfoRequest.unpack(message.body)
        if request.index >= len(self._regions):
            raise VfioUserError(EINVAL, f"region {request.index} does not exist")
        info = self._regions[request.index]
        fd = self._device.region_fd(request.index) if info.flags & RegionFlags.MMAP else None
        if fd is not None and not self._client_max_fds:
            raise VfioUserError(EINVAL, "the client takes no descriptors")
        return info.pack(), () if fd is None else (fd,)

    def _region_io_fds(self, message: Message) -> _Reply:
        request = RegionIoFdsRequest.unpack(message.body)
        if request.index >= len(self._regions):
            raise VfioUserError(EINVAL, f"region {request.index} does not exist")
        return RegionIoFds(request.index).pack(), ()

    def _irq_info(self, message: Message) -> _Reply:
        request = IrqInfoRequest.unpack(message.body)
        if request.index >= len(self._irqs):
            raise VfioUserError(EINVAL, f"interrupt type {request.index} does not exist")
        return self._irqs[request.index].pack(), ()

    def _set_irqs(self, message: Message) -> _Reply:
        request = SetIrqs.unpack(message.body)
        if request.index >= len(self._irqs):
            raise VfioUserError(EINVAL, f"interrupt type {request.index} does not exist")
        if request.start + request.count > self._irqs[request.index].count:
            raise VfioUserError(EINVAL, f"interrupts beyond those of type {request.index}")
        wanted = (0, request.count) if request.flags & IrqSet.DATA_EVENTFD else (0,)
        if len(message.fds) not in wanted:
            raise ProtocolError(f"{len(message.fds)} descriptors for {request.count} interrupts")
        self._device.set_irqs(request, list(message.fds))
        message.fds.clear()
        return _EMPTY

    def _reset(self, message: Message) -> _Reply:
        if message.body:
            raise ProtocolError("DEVICE_RESET with a body")
        self._device.reset()
        return _EMPTY

    def _feature(self, message: Message) -> _Reply:
        request = Feature.unpack(message.body)
        if request.is_get and request.index == FeatureIndex.DMA_LOGGING_REPORT:
            report = LoggingReport.unpack(request.data)
            if report.bitmap or report.bitmap_bytes > self._agreed.max_data_xfer_size:
                raise VfioUserError(EINVAL, f"dirty bitmap of {report.bitmap_bytes} bytes")
        data = self._device.feature(request)
        if request.is_get:
            reply = Feature(request.flags, data)
            body = reply.pack()
            return body if len(body) <= request.argsz else body[:_FEATURE_FIXED_BYTES], ()
        return Feature(request.flags, data or request.data).pack(), ()

    def _migration_read(self, message: Message) -> _Reply:
        request = MigData.unpack(message.body)
        if request.data:
            raise ProtocolError("MIG_DATA_READ with data")
        self._check_migration_size(request)
        data = self._device.migration_read(request.size) if request.size else b""
        if len(data) > request.size:
            raise RuntimeError(f"device returned {len(data)} bytes for {request.size}")
        return MigData(len(data), data).pack(), ()

    def _migration_write(self, message: Message) -> _Reply:
        request = MigData.unpack(message.body)
        if len(request.data) != request.size:
            raise ProtocolError("MIG_DATA_WRITE without its data")
        self._check_migration_size(request)
        if request.size:
            self._device.migration_write(request.data)
        return _EMPTY

    def _check_migration_size(self, request: MigData) -> None:
        if request.size > self._own.max_data_xfer_size:
            raise VfioUserError(EINVAL, f"transfer of {request.size} bytes")
