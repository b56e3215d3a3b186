"""A driver of the 8254x NIC and its machine, for the tests of the device.

The driver is written from the manual, not from the device: numbers stand here a second time.
"""

import mmap
import os
import queue
import random
import select
import struct
from collections.abc import Callable
from typing import Any, Protocol, cast

from lab.devices.e1000.nic import E1000
from lab.vfio_user.dma import DmaPort
from sync.registers.profile.locate import DeviceView
from sync.vfio_user.protocol import DmaMap, DmaUnmap, IrqSet, SetIrqs

DEADLINE_S = 10
MAC = bytes.fromhex("525400123456")
PEER = bytes.fromhex("525400aabbcc")
IOVA, RAM_BYTES = 0x1_0000_0000, 4 << 20
CONFIG, BAR, IO = 7, 0, 2
CTRL, STATUS, EECD, EERD, MDIC = 0x00, 0x08, 0x10, 0x14, 0x20
ICR, ICS, IMS, IMC, RCTL, TCTL = 0xC0, 0xC8, 0xD0, 0xD8, 0x100, 0x400
RDBAL, RDLEN, RDH, RDT = 0x2800, 0x2808, 0x2810, 0x2818
TDBAL, TDLEN, TDH, TDT = 0x3800, 0x3808, 0x3810, 0x3818
MTA, RA, VFTA, VET, GPRC, GPTC, TOTL, TOTH = (
    0x5200,
    0x5400,
    0x5600,
    0x38,
    0x4074,
    0x4080,
    0x40C8,
    0x40CC,
)
TXDW, LSC, RXDMT0, RXT0 = 1, 4, 0x10, 0x80
EN, UPE, MPE, LPE, BAM, VFE, SECRC = 2, 8, 16, 32, 1 << 15, 1 << 18, 1 << 26
EOP, IFCS, IC_TSE, RS, DEXT, VLE = 1, 2, 4, 8, 0x20, 0x40
TX_RING, RX_RING, TX_DATA, RX_DATA = 0, 0x10000, 0x80000, 0x200000


class FakeLink:
    """The other end of the cable, in the test's hands."""

    def __init__(self) -> None:
        self.sent: queue.Queue[bytes] = queue.Queue()

    def start(self, receive: Callable[..., Any]) -> None:
        self.deliver = receive

    def send(self, frame: bytes) -> None:
        self.sent.put(frame)

    def close(self) -> None:
        pass

    def next(self) -> bytes:
        return self.sent.get(timeout=DEADLINE_S)


class Port(Protocol):
    """What registers are accessed through: the machine itself, or something before it."""

    def read(self, region: int, offset: int, size: int) -> bytes: ...

    def write(self, region: int, offset: int, data: bytes) -> None: ...


class Ram:
    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, RAM_BYTES)
        self.bytes = mmap.mmap(self.fd, RAM_BYTES)


class Machine:
    """A NIC in a machine: memory, an interrupt, and accesses to its registers."""

    def __init__(self, ram: Ram | None = None, **options: Any) -> None:
        self.ram = ram or Ram()
        self.link = FakeLink()
        self.nic = E1000(self.link, MAC, **options)
        self.line = os.eventfd(0, os.EFD_NONBLOCK)
        self.nic.attached(cast(DmaPort, object()))
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self.nic.set_irqs(SetIrqs(flags, 0, 0, 1), [os.dup(self.line)])

    def map(self) -> None:
        self.nic.dma_map(DmaMap(3, 0, IOVA, RAM_BYTES), os.dup(self.ram.fd))

    def unmap(self) -> None:
        self.nic.dma_unmap(DmaUnmap(0, IOVA, RAM_BYTES))

    def read(self, region: int, offset: int, size: int) -> bytes:
        return self.nic.region_read(region, offset, size)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.nic.region_write(region, offset, data)

    def reset(self) -> None:
        self.nic.reset()

    def close(self) -> None:
        self.nic.detached()
        self.nic.close()
        os.close(self.line)

    def view(self) -> DeviceView:
        config = self.read(CONFIG, 0, 256)
        return DeviceView(
            vendor=int.from_bytes(config[0:2], "little"),
            device=int.from_bytes(config[2:4], "little"),
            subsystem_vendor=int.from_bytes(config[0x2C:0x2E], "little"),
            subsystem=int.from_bytes(config[0x2E:0x30], "little"),
            class_code=int.from_bytes(config[9:12], "little"),
            config_space=config,
            region_sizes={index: self.nic.region_info(index).size for index in range(9)},
        )


class Driver:
    """A driver in the style of Linux's, on a machine or on what captures its accesses."""

    def __init__(self, machine: Machine, port: Port | None = None, n: int = 16) -> None:
        self.machine = machine
        self.port = port or machine
        self.n = n
        self.tail = self.clean = 0

    @property
    def memory(self) -> mmap.mmap:
        return self.machine.ram.bytes

    def r(self, offset: int) -> int:
        return int.from_bytes(self.port.read(BAR, offset, 4), "little")

    def w(self, offset: int, value: int) -> None:
        self.port.write(BAR, offset, value.to_bytes(4, "little"))

    def io(self, offset: int, value: int) -> None:
        self.port.write(IO, 0, offset.to_bytes(4, "little"))
        self.port.write(IO, 4, value.to_bytes(4, "little"))

    def mdic(self, command: int) -> int:
        self.w(MDIC, command)
        assert self.r(MDIC) & 1 << 28
        return self.r(MDIC)

    def phy(self, register: int) -> int:
        return self.mdic(2 << 26 | 1 << 21 | register << 16) & 0xFFFF

    def begin(self, rctl: int = BAM | SECRC, ctrl: int = 0) -> None:
        self.port.write(CONFIG, 4, (7).to_bytes(2, "little"))
        self.w(IMC, 0xFFFFFFFF)
        self.io(CTRL, self.r(CTRL) | 1 << 26)
        assert not self.r(CTRL) & 1 << 26
        self.r(ICR)
        self.w(CTRL, self.r(CTRL) | ctrl)
        for first, at in ((TDBAL, TX_RING), (RDBAL, RX_RING)):
            self.w(first, (IOVA + at) & 0xFFFFFFFF)
            self.w(first + 4, (IOVA + at) >> 32)
            self.w(first + 8, 16 * self.n)
            self.w(first + 0x10, 0)
            self.w(first + 0x18, 0)
        self.w(TCTL, EN | 8)
        self.w(RCTL, rctl | EN)
        for slot in range(self.n):
            self.put(RX_RING + 16 * slot, struct.pack("<QQ", IOVA + RX_DATA + 0x4000 * slot, 0))
        self.w(RDT, self.n - 1)
        self.w(IMS, TXDW | RXT0 | RXDMT0 | LSC)

    def put(self, at: int, data: bytes) -> None:
        self.memory[at : at + len(data)] = data

    def queue(self, *descriptors: bytes) -> None:
        """Raw descriptors, 16 bytes each; the tail is not moved."""
        for raw in descriptors:
            self.put(TX_RING + 16 * self.tail, raw)
            self.tail = (self.tail + 1) % self.n

    def kick(self) -> None:
        self.w(TDT, self.tail)

    def legacy(
        self,
        data: bytes,
        at: int = 0,
        command: int = EOP | IFCS | RS,
        cso: int = 0,
        css: int = 0,
        special: int = 0,
    ) -> bytes:
        self.put(TX_DATA + at, data)
        address = IOVA + TX_DATA + at
        return struct.pack("<QHBBBBH", address, len(data), cso, command, 0, css, special)

    def data(
        self,
        data: bytes,
        at: int = 0,
        command: int = EOP | IFCS | RS,
        options: int = 0,
        special: int = 0,
    ) -> bytes:
        self.put(TX_DATA + at, data)
        lower = len(data) | 1 << 20 | (command | DEXT) << 24
        return struct.pack("<QIBBH", IOVA + TX_DATA + at, lower, 0, options, special)

    def is_sent(self, slot: int) -> bool:
        return bool(self.memory[TX_RING + 16 * slot + 12] & 1)

    def await_line(self) -> None:
        poller = select.poll()
        poller.register(self.machine.line, select.POLLIN)
        assert poller.poll(1000 * DEADLINE_S), "no interrupt"

    def wait(self) -> int:
        """Wait for an interrupt; its causes."""
        self.await_line()
        os.eventfd_read(self.machine.line)
        causes = self.r(ICR)
        flags = IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK
        self.machine.nic.set_irqs(SetIrqs(flags, 0, 0, 1), [])
        return causes

    def received(self) -> list[bytes]:
        """Frames that arrived, their buffers given back."""
        frames: list[bytes] = []
        frame = b""
        while True:
            raw = self.memory[RX_RING + 16 * self.clean : RX_RING + 16 * self.clean + 16]
            address, length, _, status, errors, _ = struct.unpack("<QHHBBH", raw)
            if not status & 1:
                return frames
            assert not errors
            at = address - IOVA
            frame += self.memory[at : at + length]
            if status & 2:
                frames.append(frame)
                frame = b""
            self.put(RX_RING + 16 * self.clean + 8, bytes(8))
            self.w(RDT, self.clean)
            self.clean = (self.clean + 1) % self.n

    def await_frames(self, count: int) -> list[bytes]:
        frames: list[bytes] = []
        while len(frames) < count:
            self.wait()
            frames += self.received()
        return frames


def frame(
    number: int = 0,
    length: int = 100,
    destination: bytes = MAC,
    source: bytes = PEER,
    ethertype: int = 0x88B5,
) -> bytes:
    body = random.Random(number).randbytes(length - 14)
    return destination + source + ethertype.to_bytes(2, "big") + body


def words_sum(data: bytearray | bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp_packet(
    payload: bytes, *, version: int = 4, protocol: int = 6
) -> tuple[bytes, int, int, int]:
    """A packet as Linux hands it over for segmentation: sums of pseudo-headers without length."""
    addresses = bytes(range(8)) if version == 4 else bytes(range(32))
    if version == 4:
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 0, 7, 0, 64, protocol, 0) + addresses
    else:
        ip = struct.pack(">IHBB", 6 << 28, 0, protocol, 64) + addresses
    partial = words_sum(addresses + struct.pack(">HH", 0, protocol))
    tcp = struct.pack(">HHIIBBHHH", 80, 81, 0xFFFFF000, 5, 0x50, 0x19, 99, partial, 0)
    ether = MAC + PEER + (b"\x08\x00" if version == 4 else b"\x86\xdd")
    return ether + ip + tcp + payload, 14, 14 + len(ip), 14 + len(ip) + len(tcp)


def context(
    ip: int, tcp: int, header: int, mss: int, *, version: int = 4, command: int = 0
) -> bytes:
    ipv4 = version == 4
    lower = (DEXT | 1 | 2 * ipv4 | command) << 24
    ip_at, ip_end = (ip + 10, max(tcp - 1, 0)) if ipv4 else (0, 0)
    return struct.pack("<BBHBBHIBBH", ip, ip_at, ip_end, tcp, tcp + 16, 0, lower, 0, header, mss)
