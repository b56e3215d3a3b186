"""What the guest's VMM does with a vfio-user device: connection, DMA map, accesses, interrupts.

In the order in which QEMU does it (hw/vfio-user/): negotiation, DMA_MAP of all RAM, device,
region and interrupt information, reset and empty BARs at machine init; eventfds with SET_IRQS
when the guest switches its interrupts on. Knows nothing of what kind of device it is.
"""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from lab.guest.errors import DeviceLost, RamError
from lab.guest.ram import DmaRegion, Ram
from lab.vfio_user.client import Client
from sync.memory import PAGE_BYTES
from sync.pci import BAR0, BAR_COUNT
from sync.vfio_user.errors import Disconnected, ProtocolError, VfioUserError
from sync.vfio_user.protocol import (
    Capabilities,
    DmaFlags,
    DmaMap,
    DmaUnmap,
    IrqSet,
    PciIrq,
    PciRegion,
    SetIrqs,
)

CONNECT_TIMEOUT_S = 5.0
MAX_VECTORS = 32
"""More than any device of ours has; SET_IRQS carries a descriptor for each."""
ROM_END = 4 << 30
CAPABILITIES = Capabilities(
    max_msg_fds=16, max_data_xfer_size=1 << 20, pgsizes=PAGE_BYTES, write_multiple=True
)


@dataclass(frozen=True, slots=True)
class DeviceShape:
    """What the device said about itself. Sizes in bytes, by region index."""

    region_bytes: dict[int, int]
    intx: int
    msix: int


class DeviceLink:
    """The connection to one device. Raises `DeviceLost` from every access when it is gone."""

    def __init__(
        self, path: str, ram: Ram, *, irq: Literal["msix", "intx"], rom_bytes: int
    ) -> None:
        self._path = path
        self._ram = ram
        self._irq = irq
        self._rom_bytes = rom_bytes
        self._client: Client | None = None
        self._used_at = 0.0
        self._shape = DeviceShape({}, 0, 0)
        self.vectors: list[int] = []
        """An eventfd for each interrupt that is switched on, by vector."""
        self.irqs_on = False
        self.longest_access_s = 0.0
        """How long the longest request to the device took: the CPU stood still meanwhile."""
        self.access_errors = 0
        """Accesses that the device answered with an error; reads gave all ones."""

    @property
    def n_vectors(self) -> int:
        """How many interrupts the device has, of the kind that is used."""
        return self._shape.msix if self._irq == "msix" else self._shape.intx

    def region_bytes(self, region: int) -> int:
        """Size of a region; 0 if the device does not have it."""
        return self._shape.region_bytes.get(region, 0)

    @property
    def lost(self) -> bool:
        return self._client is None

    def connect(self, *, machine_init: bool) -> None:
        """Connects and hands all RAM over; `machine_init` resets the device and its BARs, too.

        Interrupts that are switched on are set anew. Raises `DeviceLost` if it does not succeed.
        """
        self.close()
        try:
            self._connect(machine_init)
        except (OSError, Disconnected, ProtocolError, VfioUserError, DeviceLost) as error:
            self.close()
            raise DeviceLost(f"no device at {self._path}: {error}") from error

    def probe(self) -> None:
        """Raises `DeviceLost` if the connection is gone, which shows only when it is used: also an
        error is an answer."""
        with self._connection() as client, suppress(VfioUserError):
            client.device_info()

    def probe_if_silent(self, seconds: float) -> None:
        """As `probe`, unless the connection was used in the last `seconds`."""
        if time.monotonic() - self._used_at > seconds:
            self.probe()

    def remap_low(self) -> None:
        """Unmaps the lowest RAM region and maps it again, as a PC does when its chipset is set up:
        while firmware runs, and when a migration has been loaded."""
        region = self._ram.dma_regions[0]
        with self._connection() as client:
            client.dma_unmap(DmaUnmap(0, region.address, region.size))
        self._map_ram(region)

    def config_read(self, offset: int, size: int) -> int:
        return self._read(PciRegion.CONFIG, offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self._write(PciRegion.CONFIG, offset, size, value, posted=False)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return self._read(bar, offset, size)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Posted: it may fail without anybody noticing, as a store to a device does."""
        self._write(bar, offset, size, value, posted=True)

    def irqs_enable(self, count: int) -> None:
        """Gives the device an eventfd for each of its first `count` vectors."""
        while len(self.vectors) < count:
            self.vectors.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self.irqs_on = True
        self._set_irqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, self.vectors)

    def irqs_disable(self) -> None:
        self.irqs_on = False
        request = SetIrqs(IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, self._irq_index, 0, 0)
        with self._connection() as client:
            client.set_irqs(request)
        for fd in self.vectors:
            os.close(fd)
        self.vectors = []

    def intx_unmask(self) -> None:
        """Lets the device raise INTx again, which VFIO masks each time it fires."""
        self._set_irqs(IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK, [])

    def take_interrupts(self) -> set[int]:
        """The vectors that fired since this was last called."""
        fired = set()
        for vector, fd in enumerate(self.vectors):
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                continue
            fired.add(vector)
        return fired

    def close(self) -> None:
        """Drops the connection; eventfds stay for the next one."""
        if self._client is not None:
            client, self._client = self._client, None
            client.close()

    def _connect(self, machine_init: bool) -> None:
        self._client = Client(
            self._path,
            capabilities=CAPABILITIES,
            on_dma_read=self._dma_read,
            on_dma_write=self._dma_write,
            timeout_s=CONNECT_TIMEOUT_S,
        )
        for region in self._ram.dma_regions:
            self._map_ram(region)
        if self._rom_bytes:
            rom = DmaMap(DmaFlags.READ, 0, ROM_END - self._rom_bytes, self._rom_bytes)
            with self._connection() as client:
                client.dma_map(rom)
        self._shape = self._ask_shape()
        if machine_init:
            with self._connection() as client:
                client.reset()
            for index in range(BAR_COUNT):
                self.config_write(BAR0 + 4 * index, 4, 0)
        if self.irqs_on:
            self.irqs_enable(len(self.vectors))

    def _ask_shape(self) -> DeviceShape:
        with self._connection() as client:
            info = client.device_info()
            if info.num_regions <= PciRegion.CONFIG or info.num_irqs <= PciIrq.MSIX:
                raise DeviceLost("it is no PCI device")
            regions = (*range(BAR_COUNT), PciRegion.CONFIG)
            sizes = {index: client.region_info(index).size for index in regions}
            intx = client.irq_info(PciIrq.INTX).count
            msix = client.irq_info(PciIrq.MSIX).count
        return DeviceShape(sizes, intx, min(msix, MAX_VECTORS))

    def _map_ram(self, region: DmaRegion) -> None:
        request = DmaMap(DmaFlags.READ | DmaFlags.WRITE, region.offset, region.address, region.size)
        with self._connection() as client:
            client.dma_map(request, self._ram.fd)

    def _set_irqs(self, flags: int, fds: Sequence[int]) -> None:
        request = SetIrqs(flags, self._irq_index, 0, max(1, len(fds)))
        with self._connection() as client:
            client.set_irqs(request, fds)

    @property
    def _irq_index(self) -> PciIrq:
        return PciIrq.MSIX if self._irq == "msix" else PciIrq.INTX

    def _read(self, region: int, offset: int, size: int) -> int:
        try:
            with self._connection() as client:
                data = client.region_read(region, offset, size)
        except VfioUserError:
            self.access_errors += 1
            return (1 << 8 * size) - 1
        return int.from_bytes(data, "little")

    def _write(self, region: int, offset: int, size: int, value: int, *, posted: bool) -> None:
        data = value.to_bytes(size, "little")
        try:
            with self._connection() as client:
                client.region_write(region, offset, data, posted=posted)
        except VfioUserError:
            self.access_errors += 1

    @contextmanager
    def _connection(self) -> Iterator[Client]:
        """The client; turns the end of its connection into `DeviceLost`."""
        if self._client is None:
            raise DeviceLost("the device is not connected")
        self._used_at = time.monotonic()
        try:
            yield self._client
            self.longest_access_s = max(self.longest_access_s, time.monotonic() - self._used_at)
        except (Disconnected, ProtocolError, OSError) as error:
            self.close()
            raise DeviceLost(f"the device's connection ended: {error}") from error

    def _dma_read(self, address: int, count: int) -> bytes:
        if ROM_END - self._rom_bytes <= address and address + count <= ROM_END:
            return bytes(count)
        try:
            return bytes(self._ram.view(address, count))
        except RamError:
            raise VfioUserError(errno.EFAULT) from None

    def _dma_write(self, address: int, data: bytes) -> None:
        # DMA through the VMM is something that the VMM knows of: these pages are marked dirty.
        try:
            self._ram.write(address, data)
        except RamError:
            raise VfioUserError(errno.EFAULT) from None
