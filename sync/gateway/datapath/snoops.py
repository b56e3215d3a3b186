"""What the gateway has to know of the VMM's set-up commands, in every state.

Sans-IO. Follows the DMA map and the interrupts, takes the offer to map device memory away (a mapped
BAR would bypass us for good), and lets the VMM have no region descriptors for I/O. Not owned:
register accesses (`traps`).
"""

import errno
import os
import struct

from sync.gateway.datapath.dma import AtDevice, DmaFault, DmaMemory
from sync.gateway.datapath.interrupts import Interrupts
from sync.gateway.datapath.relay import Relay, VmmCommand
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.framing import close_fds
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    HEADER_BYTES,
    Command,
    DmaMap,
    DmaUnmap,
    IrqSet,
    PciIrq,
    RegionFlags,
    RegionIoFds,
    RegionIoFdsRequest,
    SetIrqs,
    UnmapFlags,
)

_U32 = struct.Struct("<I")
_REGION_FLAGS_AT = HEADER_BYTES + 4
_MMAP = int(RegionFlags.MMAP)
"""As a number: the complement of a flag lacks every bit that the enumeration does not know."""


class Snoops:
    """`sharing` is how a region that the VMM maps now reaches the device."""

    def __init__(self, relay: Relay, memory: DmaMemory, interrupts: Interrupts) -> None:
        self._relay = relay
        self._memory = memory
        self._interrupts = interrupts
        self.sharing = AtDevice.DIRECT
        self.away = False
        """Whether the device is gone and waited for: what the VMM sets up is for the next one."""
        self.gone: list[tuple[int, int]] = []
        """Address and size of what was unmapped meanwhile, for one that knows it already."""
        self.keep_intx_masked = False
        """A VMM that takes note of INTx unmasks it; a device that is stopped would assert it again,
        and the VMM would carry an asserted line to the target, where nobody deasserts it."""
        self.unmask_pending = False
        """The VMM has unmasked INTx meanwhile: the device has to know if it goes on here."""
        self.commands: dict[int, VmmCommand] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._region_io_fds,
            Command.DEVICE_SET_IRQS: self._set_irqs,
        }

    def _version(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        raise ProtocolError("a second VERSION")

    def _dma_map(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        request = DmaMap.unpack(message[HEADER_BYTES:])
        if len(descriptors) > 1:
            raise ProtocolError(f"DMA_MAP with {len(descriptors)} descriptors")
        descriptor = descriptors[0] if descriptors else None
        passed: list[int] = []
        try:
            if descriptor is not None and self.sharing is AtDevice.DIRECT:
                passed.append(os.dup(descriptor))
            region = self._memory.add(request, descriptor)
        except (DmaFault, OSError) as problem:
            close_fds(passed)
            close_fds(descriptors)
            number = problem.errno or errno.EINVAL
            self._relay.answer(message_id, flags, Command.DMA_MAP, error=number)
            return
        descriptors.clear()
        if self.sharing is AtDevice.NOT:
            self._relay.answer(message_id, flags, Command.DMA_MAP)
            return
        # The device may use the region before we have seen its reply: the two can come over
        # different sockets. Commands behind this one wait, so that the map is settled for them.
        region.at_device = AtDevice.DIRECT if descriptor is None else self.sharing

        def answered(error: int, reply: memoryview, more: list[int]) -> None:
            close_fds(more)
            if error:
                self._memory.take_back(region)
            self._relay.answer(message_id, flags, Command.DMA_MAP, error=error)
            self._relay.let_go()

        self._relay.hold()
        self._relay.ask(
            Command.DMA_MAP,
            for_device(request, region.at_device).pack(),
            passed,
            answered,
            settled_by_loss=True,
        )

    def _dma_unmap(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        request = DmaUnmap.unpack(message[HEADER_BYTES:])
        close_fds(descriptors)
        if request.flags & UnmapFlags.ALL:
            regions = self._memory.regions
        else:
            try:
                regions = [self._memory.exactly(request.address, request.size)]
            except DmaFault as fault:
                self._relay.answer(message_id, flags, Command.DMA_UNMAP, error=fault.errno)
                return
        known = [region for region in regions if region.at_device is not AtDevice.NOT]
        if self.away:
            self.gone += [(region.address, region.request.size) for region in known]
        if not known or self.away:
            for region in regions:
                self._memory.remove(region)
            self._relay.answer(message_id, flags, Command.DMA_UNMAP, request.pack())
            return

        def answered(error: int, reply: memoryview, more: list[int]) -> None:
            close_fds(more)
            if not error:
                for region in regions:
                    self._memory.remove(region)
            body = b"" if error else request.pack()
            self._relay.answer(message_id, flags, Command.DMA_UNMAP, body, error)
            self._relay.let_go()

        # Until the device has let go it may still ask for the region, so it stays in the map.
        self._relay.hold()
        self._relay.ask(Command.DMA_UNMAP, request.pack(), (), answered, settled_by_loss=True)

    def _region_info(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        close_fds(descriptors)

        def answered(error: int, reply: memoryview, more: list[int]) -> None:
            close_fds(more)
            if len(reply) >= _REGION_FLAGS_AT + _U32.size:
                (given,) = _U32.unpack_from(reply, _REGION_FLAGS_AT)
                _U32.pack_into(reply, _REGION_FLAGS_AT, given & ~_MMAP)
            if not flags & FLAG_NO_REPLY:
                self._relay.pass_back(message_id, reply, [])

        self._relay.snoop(flags, message, (), answered)

    def _region_io_fds(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        request = RegionIoFdsRequest.unpack(message[HEADER_BYTES:])
        close_fds(descriptors)
        body = RegionIoFds(request.index).pack()
        self._relay.answer(message_id, flags, Command.DEVICE_GET_REGION_IO_FDS, body)

    def _set_irqs(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        request = SetIrqs.unpack(message[HEADER_BYTES:])
        if (
            self.keep_intx_masked
            and request.index == PciIrq.INTX
            and request.flags == IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK
        ):
            self.unmask_pending = True
            close_fds(descriptors)
            self._relay.answer(message_id, flags, Command.DEVICE_SET_IRQS)
            return
        copies: list[int] = []
        try:
            copies.extend(os.dup(descriptor) for descriptor in descriptors)
        except OSError as error:
            close_fds(copies)
            close_fds(descriptors)
            number = error.errno or errno.EMFILE
            self._relay.answer(message_id, flags, Command.DEVICE_SET_IRQS, error=number)
            return
        # Followed as it goes by: should the device refuse it, a spurious interrupt is all it costs.
        self._interrupts.apply(request, copies)
        if self.away:
            close_fds(descriptors)
            self._relay.answer(message_id, flags, Command.DEVICE_SET_IRQS)
            return
        passed, descriptors[:] = list(descriptors), []
        if self._interrupts.tapping:
            passed = self._interrupts.tap(passed)
        self._relay.relay_command(message_id, flags, message, passed)


def for_device(request: DmaMap, at_device: AtDevice) -> DmaMap:
    """DMA_MAP as the device gets it: without a descriptor there is no offset."""
    if at_device is AtDevice.MESSAGE:
        return DmaMap(request.flags, 0, request.address, request.size)
    return request
