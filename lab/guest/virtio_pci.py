"""The driver's side of virtio over PCI: finding its structures, features, queues, interrupts.

Source: virtio 1.2, sections 3.1 (initialisation), 4.1.4 (PCI capabilities), 4.1.4.3 (common
configuration). Only what a driver may know: the device is found by its capabilities.
"""

import time
from dataclasses import asdict, dataclass
from enum import IntEnum, IntFlag
from typing import Any, Literal

from lab.guest import pci_function
from lab.guest.device_link import DeviceLink
from lab.guest.errors import GuestPanic
from lab.guest.virtqueue import QueueAddresses
from sync import pci

VENDOR_ID = 0x1AF4
MODERN_DEVICE_ID_BASE = 0x1040
NO_VECTOR = 0xFFFF
RESET_DEADLINE_S = 10.0
CONFIG_VECTOR = 0
QUEUE_VECTOR = 1
ISR_QUEUE = 1
ISR_CONFIG = 2


class Feature(IntEnum):
    """Feature bits, virtio-blk's (section 5.2.3) and the reserved ones (section 6)."""

    BLK_FLUSH = 9
    RING_INDIRECT_DESC = 28
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    """It reaches memory by the addresses that the VMM maps; a function behind an IOMMU insists."""


class Status(IntFlag):
    """The device status field (virtio specification 1.2, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Common(IntEnum):
    """Offsets in the common configuration structure, in bytes."""

    DEVICE_FEATURE_SELECT = 0
    DEVICE_FEATURE = 4
    DRIVER_FEATURE_SELECT = 8
    DRIVER_FEATURE = 12
    CONFIG_MSIX_VECTOR = 16
    NUM_QUEUES = 18
    DEVICE_STATUS = 20
    QUEUE_SELECT = 22
    QUEUE_SIZE = 24
    QUEUE_MSIX_VECTOR = 26
    QUEUE_ENABLE = 28
    QUEUE_NOTIFY_OFF = 30
    QUEUE_DESC = 32
    QUEUE_DRIVER = 40
    QUEUE_DEVICE = 48


@dataclass(frozen=True, slots=True)
class Structure:
    """Where a virtio structure lies: BAR, offset and length in bytes."""

    bar: int
    offset: int
    length: int


@dataclass(slots=True)
class Found:
    """What was found at boot. It is driver state, and moves with the guest."""

    bars: list[pci_function.AssignedBar]
    msix_capability: int
    common: Structure
    notify: Structure
    isr: Structure
    device: Structure
    notify_multiplier: int
    notify_offset: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_STRUCTURE_OF_TYPE = {1: "common", 2: "notify", 3: "isr", 4: "device"}
_NOTIFY_TYPE = 2
_NOTIFY_MULTIPLIER_AT = 16


def probe(link: DeviceLink, device_type: int) -> Found:
    """Assigns BARs and finds the structures of a modern device of this virtio type.

    Raises `GuestPanic` if it is something else.
    """
    vendor, device = pci_function.identity(link)
    if (vendor, device) != (VENDOR_ID, MODERN_DEVICE_ID_BASE + device_type):
        raise GuestPanic(f"the device is {vendor:04x}:{device:04x}, no virtio {device_type}")
    bars = pci_function.assign_bars(link)
    structures: dict[str, Structure] = {}
    multiplier = msix = 0
    for capability in pci_function.capabilities(link):
        if capability.id == pci.MSIX_CAPABILITY:
            msix = capability.offset
        if capability.id != pci.VENDOR_CAPABILITY:
            continue
        kind = link.config_read(capability.offset + 3, 1)
        name = _STRUCTURE_OF_TYPE.get(kind)
        # The first one of each type is the one that the device prefers.
        if name is None or name in structures:
            continue
        found = Structure(
            link.config_read(capability.offset + 4, 1),
            link.config_read(capability.offset + 8, 4),
            link.config_read(capability.offset + 12, 4),
        )
        if found.offset + found.length > link.region_bytes(found.bar):
            raise GuestPanic(f"the device's virtio structure {name} is not inside its BAR")
        structures[name] = found
        if kind == _NOTIFY_TYPE:
            multiplier = link.config_read(capability.offset + _NOTIFY_MULTIPLIER_AT, 4)
    missing = sorted(set(_STRUCTURE_OF_TYPE.values()) - set(structures))
    if missing:
        raise GuestPanic(f"the device has no virtio structure {', '.join(missing)}")
    return Found(
        bars,
        msix,
        structures["common"],
        structures["notify"],
        structures["isr"],
        structures["device"],
        multiplier,
    )


class VirtioPci:
    """One virtio device with one queue. `found` is set by `start` or by whoever loads it."""

    def __init__(self, link: DeviceLink, device_type: int, irq: Literal["msix", "intx"]) -> None:
        self._link = link
        self._device_type = device_type
        self._irq = irq
        self.found: Found | None = None
        self.features = 0

    def start(self, wanted: set[Feature], queue: QueueAddresses, queue_size: int) -> None:
        """From a device in any state to DRIVER_OK. Raises `GuestPanic` if it does not cooperate."""
        link = self._link
        self.found = found = probe(link, self._device_type)
        command = pci.Command.MEMORY | pci.Command.BUS_MASTER
        if self._irq == "msix":
            command |= pci.Command.INTX_DISABLE
        link.config_write(pci.COMMAND, 2, command)
        self._reset()
        self._switch_irqs_on(found)
        self._set_status(Status.ACKNOWLEDGE)
        self._set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self._negotiate(wanted)
        if self._irq == "msix":
            self._set_vector(Common.CONFIG_MSIX_VECTOR, CONFIG_VECTOR)
        self._set_queue_up(found, queue, queue_size)
        self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)

    def restore_config(self) -> None:
        """Writes BARs, command and MSI-X control anew: a device that was restarted lost them."""
        found = self._require_found()
        link = self._link
        for bar in found.bars:
            pci_function.place_bar(link, bar)
        command = pci.Command.MEMORY | pci.Command.BUS_MASTER
        if self._irq == "msix":
            command |= pci.Command.INTX_DISABLE
        link.config_write(pci.COMMAND, 2, command)
        if self._irq == "msix":
            self._write_msix_control(found, pci.MSIX_ENABLE)

    def status(self) -> int:
        return self._read(Common.DEVICE_STATUS, 1)

    def notify(self) -> None:
        """Tells the device that queue 0 has something new."""
        found = self._require_found()
        at = found.notify.offset + found.notify_offset * found.notify_multiplier
        self._link.bar_write(found.notify.bar, at, 2, 0)

    def read_isr(self) -> int:
        """ISR status; reading clears it and takes INTx back."""
        found = self._require_found()
        return self._link.bar_read(found.isr.bar, found.isr.offset, 1)

    def device_config(self, offset: int, size: int) -> int:
        found = self._require_found()
        return self._link.bar_read(found.device.bar, found.device.offset + offset, size)

    def has(self, feature: Feature) -> bool:
        return bool(self.features >> feature & 1)

    def _reset(self) -> None:
        self._set_status(0)
        deadline = time.monotonic() + RESET_DEADLINE_S
        while self.status():
            if time.monotonic() > deadline:
                raise GuestPanic(f"the device does not reset in {RESET_DEADLINE_S:g} s")
            time.sleep(0.001)

    def _switch_irqs_on(self, found: Found) -> None:
        if self._irq == "msix":
            if not found.msix_capability or self._link.n_vectors <= QUEUE_VECTOR:
                raise GuestPanic("the device has no MSI-X with two vectors; choose irq=intx")
            self._write_msix_control(found, pci.MSIX_ENABLE)
            self._link.irqs_enable(QUEUE_VECTOR + 1)
        else:
            if not self._link.n_vectors:
                raise GuestPanic("the device has no INTx; choose irq=msix")
            self._link.irqs_enable(1)

    def _write_msix_control(self, found: Found, value: int) -> None:
        self._link.config_write(found.msix_capability + 2, 2, value)

    def _negotiate(self, wanted: set[Feature]) -> None:
        offered = 0
        for half in (0, 1):
            self._write(Common.DEVICE_FEATURE_SELECT, 4, half)
            offered |= self._read(Common.DEVICE_FEATURE, 4) << 32 * half
        self.features = offered & sum(1 << bit for bit in wanted)
        if not self.has(Feature.VERSION_1):
            raise GuestPanic("the device does not offer VERSION_1")
        for half in (0, 1):
            self._write(Common.DRIVER_FEATURE_SELECT, 4, half)
            self._write(Common.DRIVER_FEATURE, 4, self.features >> 32 * half & 0xFFFF_FFFF)
        self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        if not self.status() & Status.FEATURES_OK:
            raise GuestPanic(f"the device does not accept the features {self.features:#x}")

    def _set_queue_up(self, found: Found, queue: QueueAddresses, size: int) -> None:
        self._write(Common.QUEUE_SELECT, 2, 0)
        largest = self._read(Common.QUEUE_SIZE, 2)
        if largest < size:
            raise GuestPanic(f"the device's queue has {largest} entries, {size} are wanted")
        self._write(Common.QUEUE_SIZE, 2, size)
        if self._irq == "msix":
            self._set_vector(Common.QUEUE_MSIX_VECTOR, QUEUE_VECTOR)
        for register, address in (
            (Common.QUEUE_DESC, queue.descriptors),
            (Common.QUEUE_DRIVER, queue.driver),
            (Common.QUEUE_DEVICE, queue.device),
        ):
            # Section 4.1.3.1: a 64-bit field is accessed as two 32-bit ones.
            self._write(register, 4, address & 0xFFFF_FFFF)
            self._write(register + 4, 4, address >> 32)
        found.notify_offset = self._read(Common.QUEUE_NOTIFY_OFF, 2)
        self._write(Common.QUEUE_ENABLE, 2, 1)

    def _set_vector(self, register: int, vector: int) -> None:
        self._write(register, 2, vector)
        if self._read(register, 2) != vector:
            raise GuestPanic(f"the device does not take MSI-X vector {vector}")

    def _set_status(self, status: int) -> None:
        self._write(Common.DEVICE_STATUS, 1, status)

    def _read(self, register: int, size: int) -> int:
        common = self._require_found().common
        return self._link.bar_read(common.bar, common.offset + register, size)

    def _write(self, register: int, size: int, value: int) -> None:
        common = self._require_found().common
        self._link.bar_write(common.bar, common.offset + register, size, value)

    def _require_found(self) -> Found:
        if self.found is None:
            raise GuestPanic("the device was not probed")
        return self.found
