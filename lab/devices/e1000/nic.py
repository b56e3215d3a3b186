"""An Intel 82540EM gigabit NIC, as the stock e1000 driver knows it.

Owns what each register does, interrupts by INTx, and when the transmitter and the receiver run.
Does not own rings (`transmit`, `receive`), PHY, EEPROM, or the cable (`cable`).

===  ==========  =====================================================================
BAR  bytes       what
===  ==========  =====================================================================
0    0x20000     the registers of `registers`, the statistics, 4 bytes each, accessed
                 in multiples of 4 bytes; other addresses read as 0 and take no write
2    0x40        I/O: an address in BAR 0 at 0 (IOADDR), its register at 4 (IODATA)
===  ==========  =====================================================================

A device that takes over registers by replay needs no state beside them, with these exceptions,
which no register holds: a transmit context that the driver uses for packets behind the next one
(Linux writes one in front of each packet that needs it), how far a Microwire command has come, and
what the driver wrote to the PHY.

ICS reads as ICR, without clearing it, as the hardware does: a pending cause can be seen, and set
elsewhere. DMA needs bus mastering in the PCI command register and RCTL.EN or TCTL.EN. Interrupt
delays and throttling are accepted and not kept; flow control, loopback and wake-up do nothing.

Source: Intel PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual.
"""

import logging
import threading
from collections.abc import Callable
from enum import Enum

from lab.devices.config_space import Bar, BarKind, ConfigSpace, PciIdentity
from lab.devices.e1000.cable import Link
from lab.devices.e1000.eeprom import Eeprom, eeprom_words
from lab.devices.e1000.phy import INTERRUPT as MDIO_INTERRUPT
from lab.devices.e1000.phy import Phy
from lab.devices.e1000.receive import Receiver
from lab.devices.e1000.registers import (
    CAUSES,
    Cause,
    Control,
    ReceiveControl,
    Reg,
    RegisterFile,
    TransmitControl,
)
from lab.devices.e1000.statistics import FIRST as FIRST_STATISTIC
from lab.devices.e1000.statistics import LAST as LAST_STATISTIC
from lab.devices.e1000.statistics import Statistics
from lab.devices.e1000.transmit import Transmitter
from lab.devices.errors import DeviceError, StateStreamError
from lab.devices.interrupts import Interrupts
from lab.devices.memory import MemoryAbsent, MemoryFault
from lab.devices.pci_device import PciDevice
from sync.pci import Command

logger = logging.getLogger(__name__)

VENDOR_ID = 0x8086
DEVICE_ID = 0x100E
_CLASS_CODE = 0x020000
_REVISION_ID = 2

REGISTER_BAR = 0
IO_BAR = 2
BAR_BYTES = 0x20000
IO_BAR_BYTES = 0x40
IO_ADDRESS, IO_DATA = 0, 4
MAC_BYTES = 6

_N_WORKERS = 2
_RINGS = frozenset(
    first + at for first in (Reg.RDBAL, Reg.TDBAL) for at in (0x00, 0x04, 0x08, 0x10)
)
_CONTROLS = frozenset({int(Reg.RCTL), int(Reg.TCTL)})


class Direction(Enum):
    """What the device's threads do."""

    TRANSMIT = "transmit"
    RECEIVE = "receive"


class E1000(PciDevice[Direction]):
    """A NIC on `link`. `mac`: 6 bytes, a unicast address. It offers no VFIO migration.

    `logging_page_bytes` is that of `PciDevice`. Raises `DeviceError`.
    """

    def __init__(self, link: Link, mac: bytes, *, logging_page_bytes: int | None = None) -> None:
        if len(mac) != MAC_BYTES or mac[0] & 1:
            raise DeviceError(f"{mac.hex(':')} is no address of a NIC: 6 bytes, not multicast")
        self._link = link
        self._registers = RegisterFile(mac)
        self._eeprom = Eeprom(eeprom_words(mac, vendor=VENDOR_ID, device=DEVICE_ID))
        self._phy = Phy()
        self._statistics = Statistics()
        self._io_address = 0
        self._cause_lock = threading.Lock()
        self._causes = 0
        self._mask = 0
        config = ConfigSpace(
            PciIdentity(
                VENDOR_ID,
                DEVICE_ID,
                _CLASS_CODE,
                revision_id=_REVISION_ID,
                subsystem_vendor_id=VENDOR_ID,
                subsystem_id=DEVICE_ID,
            ),
            [Bar(REGISTER_BAR, BAR_BYTES), Bar(IO_BAR, IO_BAR_BYTES, BarKind.IO)],
            interrupt_pin=1,
        )
        super().__init__(
            config,
            Interrupts(0),
            msix_bar=None,
            n_workers=_N_WORKERS,
            v2=False,
            logging_page_bytes=logging_page_bytes,
        )
        self._transmitter = Transmitter(
            self._registers, self.memory, self._statistics, link.send, self._raise
        )
        self._receiver = Receiver(self._registers, self.memory, self._statistics, self._raise)
        self._locks = {direction: threading.Lock() for direction in Direction}
        self._read_handlers: dict[int, Callable[[], int]] = {
            Reg.CTRL_COPY: lambda: self._registers[Reg.CTRL],
            Reg.EECD: self._eeprom.read_eecd,
            Reg.EERD: self._eeprom.read_eerd,
            Reg.MDIC: lambda: self._phy.mdic,
            Reg.ICR: self._take_causes,
            Reg.ICS: lambda: self._causes,
            Reg.IMS: lambda: self._mask,
        }
        self._write_handlers: dict[int, Callable[[int], None]] = {
            Reg.CTRL: self._write_control,
            Reg.CTRL_COPY: self._write_control,
            Reg.EECD: self._eeprom.write_eecd,
            Reg.EERD: self._eeprom.write_eerd,
            Reg.MDIC: self._write_mdic,
            Reg.ICR: self._clear,
            Reg.ICS: lambda value: self._raise(Cause(value & CAUSES)),
            Reg.IMS: lambda value: self._set_mask(self._mask | value & CAUSES),
            Reg.IMC: lambda value: self._set_mask(self._mask & ~value),
            Reg.TDT: lambda value: self._ring_doorbell(Reg.TDT, value),
            Reg.RDT: lambda value: self._ring_doorbell(Reg.RDT, value),
        }
        link.start(self._arrived)

    def close(self) -> None:
        self._receiver.close()
        self._link.close()
        super().close()

    # Registers.

    def bar_read(self, bar: int, offset: int, count: int) -> bytes:
        read = self._read if bar == REGISTER_BAR else self._read_io
        first = offset & -4
        words = b"".join(read(at).to_bytes(4, "little") for at in range(first, offset + count, 4))
        return words[offset - first : offset - first + count]

    def bar_write(self, bar: int, offset: int, data: bytes) -> None:
        if offset % 4 or len(data) % 4:
            return
        write = self._write if bar == REGISTER_BAR else self._write_io
        for at in range(0, len(data), 4):
            write(offset + at, int.from_bytes(data[at : at + 4], "little"))

    def _read(self, offset: int) -> int:
        handler = self._read_handlers.get(offset)
        if handler is not None:
            return handler()
        if FIRST_STATISTIC <= offset <= LAST_STATISTIC:
            return self._statistics.read(offset)
        return self._registers.read(offset)

    def _write(self, offset: int, value: int) -> None:
        handler = self._write_handlers.get(offset)
        if handler is not None:
            handler(value)
        elif offset in _RINGS or offset in _CONTROLS:
            # A driver that has switched a direction off frees its buffers.
            with self.workers.quiet():
                self._registers.write(offset, value)
                if not self._is_enabled(Direction.RECEIVE):
                    self._receiver.reset()
            if offset in _CONTROLS:
                self.wake()
        else:
            self._registers.write(offset, value)

    def _read_io(self, offset: int) -> int:
        if offset == IO_ADDRESS:
            return self._io_address
        return self._read(self._io_address) if offset == IO_DATA else 0

    def _write_io(self, offset: int, value: int) -> None:
        if offset == IO_ADDRESS:
            self._io_address = value & (BAR_BYTES - 4)
        elif offset == IO_DATA:
            self._write(self._io_address, value)

    def _write_control(self, value: int) -> None:
        if value & Control.RESET:
            with self.workers.quiet():
                self._reset_registers()
            return
        self._registers.write(Reg.CTRL, value)
        if value & Control.PHY_RESET:
            self._phy.reset()

    def _write_mdic(self, value: int) -> None:
        self._phy.command(value)
        if value & MDIO_INTERRUPT:
            self._raise(Cause.MDIO)

    def _ring_doorbell(self, register: int, value: int) -> None:
        self._registers.write(register, value)
        direction = Direction.TRANSMIT if register == Reg.TDT else Direction.RECEIVE
        if self._is_enabled(direction):
            self.memory.settle()
            self.workers.kick(direction)

    # Work.

    def step(self, work: Direction) -> None:
        run = self._transmitter.step if work is Direction.TRANSMIT else self._receiver.step
        try:
            with self._locks[work]:
                more = run()
        except MemoryAbsent as absent:
            # The next map kicks again.
            logger.debug("%s waits: %s", work.value, absent)
        except MemoryFault as fault:
            logger.debug("%s waits for the driver: %s", work.value, fault)
        else:
            if more:
                self.workers.kick(work)

    def failed(self, work: Direction) -> None:
        """The next doorbell, or frame, tries again."""

    def wake(self) -> None:
        self._kick(Direction.TRANSMIT)
        self._kick(Direction.RECEIVE)

    def _kick(self, direction: Direction) -> None:
        if self._is_enabled(direction):
            self.workers.kick(direction)

    def _is_enabled(self, direction: Direction) -> bool:
        if direction is Direction.TRANSMIT:
            return bool(self._registers[Reg.TCTL] & TransmitControl.ENABLE)
        return bool(self._registers[Reg.RCTL] & ReceiveControl.ENABLE)

    def _arrived(self, frame: bytes) -> None:
        if self._is_enabled(Direction.RECEIVE):
            self._receiver.offer(frame)
            self.workers.kick(Direction.RECEIVE)

    # Interrupts.

    def update_line(self) -> None:
        with self._cause_lock:
            self._drive_line()

    def _raise(self, causes: Cause) -> None:
        with self._cause_lock:
            self._causes |= causes
            self._drive_line()

    def _clear(self, causes: int) -> None:
        with self._cause_lock:
            self._causes &= ~causes
            self._drive_line()

    def _take_causes(self) -> int:
        with self._cause_lock:
            causes, self._causes = self._causes, 0
            self._drive_line()
        return causes

    def _set_mask(self, mask: int) -> None:
        with self._cause_lock:
            self._mask = mask
            self._drive_line()

    def _drive_line(self) -> None:
        pending = bool(self._causes & self._mask)
        self.config.interrupt_status = pending
        disabled = bool(self.config.command & Command.INTX_DISABLE)
        self.interrupts.set_level(pending and not disabled)

    # State.

    def reset_function(self) -> None:
        self._io_address = 0
        self.workers.cancel_all()
        self.memory.forget_absent()
        self._reset_registers()

    def client_lost(self) -> frozenset[int]:
        # The line is a level: the next client sees it as it is.
        return frozenset()

    def function_identity(self) -> bytes:
        return b""

    def save_function(self) -> bytes:
        raise StateStreamError("this device offers no VFIO migration")

    def load_function(self, state: bytes) -> Callable[[], None]:
        raise StateStreamError("this device offers no VFIO migration")

    def _reset_registers(self) -> None:
        self._registers.reset()
        self._eeprom.reset()
        self._phy.mdic = 0
        self._phy.reset()
        self._statistics.reset()
        self._transmitter.reset()
        self._receiver.reset()
        with self._cause_lock:
            self._causes = self._mask = 0
            self._drive_line()
