"""The 8254x NIC from a driver's side: registers, rings, interrupts, and its migration by profile.

The driver is written from the manual, not from the device: numbers stand here a second time.
"""

import contextlib
import mmap
import os
import queue
import random
import select
import struct
import time
import zlib

import pytest
from trio.testing import trio_test

from sync.devices.e1000 import E1000
from sync.devices.errors import DeviceError
from sync.registers.choose import load_profiles, source_for, target_for
from sync.registers.device import DeviceView
from sync.registers.record import Access, Op, pack_access, unpack_accesses
from sync.vfio_user.protocol import DmaMap, DmaUnmap, Feature, IrqSet, SetIrqs, VfioUserError

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

    def __init__(self):
        self.sent = queue.Queue()

    def start(self, receive):
        self.deliver = receive

    def send(self, frame):
        self.sent.put(frame)

    def close(self):
        pass

    def next(self):
        return self.sent.get(timeout=DEADLINE_S)


class Ram:
    def __init__(self):
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, RAM_BYTES)
        self.bytes = mmap.mmap(self.fd, RAM_BYTES)


class Machine:
    """A NIC in a machine: memory, an interrupt, and accesses to its registers."""

    def __init__(self, ram=None, **options):
        self.ram = ram or Ram()
        self.link = FakeLink()
        self.nic = E1000(self.link, MAC, **options)
        self.line = os.eventfd(0, os.EFD_NONBLOCK)
        self.nic.attached(object())
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self.nic.set_irqs(SetIrqs(flags, 0, 0, 1), [os.dup(self.line)])

    def map(self):
        self.nic.dma_map(DmaMap(3, 0, IOVA, RAM_BYTES), os.dup(self.ram.fd))

    def unmap(self):
        self.nic.dma_unmap(DmaUnmap(0, IOVA, RAM_BYTES))

    def read(self, region, offset, size):
        return self.nic.region_read(region, offset, size)

    def write(self, region, offset, data):
        self.nic.region_write(region, offset, data)

    def reset(self):
        self.nic.reset()

    def close(self):
        self.nic.detached()
        self.nic.close()
        os.close(self.line)

    def view(self):
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

    def __init__(self, machine, port=None, n=16):
        self.machine = machine
        self.port = port or machine
        self.n = n
        self.tail = self.clean = 0

    @property
    def memory(self):
        return self.machine.ram.bytes

    def r(self, offset):
        return int.from_bytes(self.port.read(BAR, offset, 4), "little")

    def w(self, offset, value):
        self.port.write(BAR, offset, value.to_bytes(4, "little"))

    def io(self, offset, value):
        self.port.write(IO, 0, offset.to_bytes(4, "little"))
        self.port.write(IO, 4, value.to_bytes(4, "little"))

    def mdic(self, command):
        self.w(MDIC, command)
        assert self.r(MDIC) & 1 << 28
        return self.r(MDIC)

    def phy(self, register):
        return self.mdic(2 << 26 | 1 << 21 | register << 16) & 0xFFFF

    def begin(self, rctl=BAM | SECRC, ctrl=0):
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

    def put(self, at, data):
        self.memory[at : at + len(data)] = data

    def queue(self, *descriptors):
        """Raw descriptors, 16 bytes each; the tail is not moved."""
        for raw in descriptors:
            self.put(TX_RING + 16 * self.tail, raw)
            self.tail = (self.tail + 1) % self.n

    def kick(self):
        self.w(TDT, self.tail)

    def legacy(self, data, at=0, command=EOP | IFCS | RS, cso=0, css=0, special=0):
        self.put(TX_DATA + at, data)
        address = IOVA + TX_DATA + at
        return struct.pack("<QHBBBBH", address, len(data), cso, command, 0, css, special)

    def data(self, data, at=0, command=EOP | IFCS | RS, options=0, special=0):
        self.put(TX_DATA + at, data)
        lower = len(data) | 1 << 20 | (command | DEXT) << 24
        return struct.pack("<QIBBH", IOVA + TX_DATA + at, lower, 0, options, special)

    def is_sent(self, slot):
        return bool(self.memory[TX_RING + 16 * slot + 12] & 1)

    def await_line(self):
        poller = select.poll()
        poller.register(self.machine.line, select.POLLIN)
        assert poller.poll(1000 * DEADLINE_S), "no interrupt"

    def wait(self):
        """Wait for an interrupt; its causes."""
        self.await_line()
        os.eventfd_read(self.machine.line)
        causes = self.r(ICR)
        flags = IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK
        self.machine.nic.set_irqs(SetIrqs(flags, 0, 0, 1), [])
        return causes

    def received(self):
        """Frames that arrived, their buffers given back."""
        frames, frame = [], b""
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

    def await_frames(self, count):
        frames = []
        while len(frames) < count:
            self.wait()
            frames += self.received()
        return frames


def frame(number=0, length=100, destination=MAC, source=PEER, ethertype=0x88B5):
    body = random.Random(number).randbytes(length - 14)
    return destination + source + ethertype.to_bytes(2, "big") + body


def words_sum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp_packet(payload, *, version=4, protocol=6):
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


def context(ip, tcp, header, mss, *, version=4, command=0):
    ipv4 = version == 4
    lower = (DEXT | 1 | 2 * ipv4 | command) << 24
    ip_at, ip_end = (ip + 10, max(tcp - 1, 0)) if ipv4 else (0, 0)
    return struct.pack("<BBHBBHIBBH", ip, ip_at, ip_end, tcp, tcp + 16, 0, lower, 0, header, mss)


@pytest.fixture
def machines():
    with contextlib.ExitStack() as stack:

        def make(ram=None, **options):
            machine = Machine(ram, **options)
            stack.callback(machine.close)
            return machine

        yield make


@pytest.fixture
def driver(machines):
    machine = machines()
    machine.map()
    driver = Driver(machine)
    driver.begin()
    return driver


def test_what_the_driver_finds_on_the_bus(machines):
    machine = machines()
    config = machine.read(CONFIG, 0, 64)
    assert config[:4] == bytes.fromhex("86800e10") and config[9:12] == bytes.fromhex("000002")
    assert config[0x3D] == 1
    machine.write(CONFIG, 0x10, b"\xff" * 12)
    assert struct.unpack("<III", machine.read(CONFIG, 0x10, 12)) == (0xFFFE0000, 0, 0xFFFFFFC1)
    assert machine.nic.irq_info(2).count == 0 and machine.nic.irq_info(0).count == 1


@pytest.mark.parametrize("through_io", [False, True])
def test_a_reset_by_the_driver(machines, through_io):
    driver = Driver(machines())
    before = {at: driver.r(at) for at in (CTRL, STATUS, RCTL, TCTL, RA, RA + 4, 0x2820, 0x5820)}
    for at in (RCTL, TCTL, RA, RA + 4, 0x2820, 0x5820, IMS, ICS, TDBAL, RDT):
        driver.w(at, 0xFFFFFFF8)
    assert driver.r(IMS) and driver.r(TDBAL) and driver.r(RDT)
    (driver.io if through_io else driver.w)(CTRL, driver.r(CTRL) | 1 << 26)
    assert {at: driver.r(at) for at in before} == before
    assert [driver.r(at) for at in (ICR, IMS, TDBAL, RDT)] == [0, 0, 0, 0]
    assert struct.pack("<II", driver.r(RA), driver.r(RA + 4))[:6] == MAC
    assert driver.r(STATUS) & 2 and driver.r(RA + 4) >> 31


def test_eeprom_by_eerd_and_by_microwire(machines):
    driver = Driver(machines())

    def eerd(address):
        driver.w(EERD, 1 | address << 8)
        assert driver.r(EERD) & 0x10
        return driver.r(EERD) >> 16

    def clock(bit):
        driver.w(EECD, 0x42 | bit << 2)
        driver.w(EECD, 0x43 | bit << 2)
        out = driver.r(EECD) >> 3 & 1
        driver.w(EECD, 0x42 | bit << 2)
        return out

    def microwire(address):
        driver.w(EECD, 0x40)
        assert driver.r(EECD) & 0x80
        driver.w(EECD, 0x42)
        for bit in f"0110{address:06b}":
            clock(int(bit))
        value = int("".join(str(clock(0)) for _ in range(16)), 2)
        driver.w(EECD, 0)
        return value

    words = [eerd(address) for address in range(64)]
    assert words == [microwire(address) for address in range(64)]
    assert sum(words) & 0xFFFF == 0xBABA
    assert struct.pack("<3H", *words[:3]) == MAC
    assert not driver.r(EECD) & 0x80


def test_phy_by_mdic(machines):
    driver = Driver(machines())
    assert (driver.phy(2), driver.phy(3)) == (0x0141, 0x0C20)
    assert driver.phy(1) & 0x24 == 0x24
    write = 1 << 26 | 1 << 21
    driver.mdic(write | 4 << 16 | 0x1234)
    assert driver.phy(4) == 0x1234
    driver.mdic(write | 1 << 16)
    assert driver.phy(1) & 0x24 == 0x24
    driver.mdic(write | 0x8000)
    assert driver.phy(4) == 0x0DE1
    assert driver.mdic(2 << 26 | 7 << 21) & 1 << 30


def test_interrupt_causes_and_masks(machines):
    driver = Driver(machines())
    driver.w(ICS, LSC | RXT0)
    assert driver.r(ICS) == driver.r(ICS) == LSC | RXT0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(driver.machine.line)
    driver.w(IMS, LSC)
    driver.w(IMS, TXDW)
    assert driver.r(IMS) == LSC | TXDW
    assert driver.machine.read(CONFIG, 6, 1)[0] & 8
    assert driver.wait() == LSC | RXT0
    assert driver.r(ICR) == 0 and not driver.machine.read(CONFIG, 6, 1)[0] & 8
    driver.w(IMC, LSC)
    assert driver.r(IMS) == TXDW
    driver.w(ICS, LSC | TXDW)
    driver.w(ICR, TXDW)
    assert driver.r(ICS) == LSC


def test_legacy_transmission(driver):
    frames = [frame(number, 60 + 50 * number) for number in range(10)]
    for number, each in enumerate(frames):
        cut = 20 + number
        driver.queue(
            driver.legacy(each[:cut], 2048 * number, IFCS),
            driver.legacy(each[cut:], 2048 * number + 1024),
        )
        driver.kick()
        assert driver.machine.link.next() == each
        assert driver.wait() & TXDW
        last = (2 * number + 1) % driver.n
        assert driver.is_sent(last) and driver.r(TDH) == driver.tail
        driver.put(TX_RING + 16 * last, bytes(16))
    assert driver.r(GPTC) == 10 and driver.r(GPTC) == 0
    octets = sum(len(each) + 4 for each in frames)
    assert (driver.r(TOTL), driver.r(TOTL)) == (octets, octets)
    assert driver.r(TOTH) == 0 and driver.r(TOTL) == 0


def test_short_frames_are_padded_and_legacy_checksums_inserted(driver):
    driver.queue(driver.legacy(frame(0, 20)))
    driver.kick()
    assert driver.machine.link.next() == frame(0, 20).ljust(60, b"\0")
    plain = frame(1, 101)
    driver.queue(driver.legacy(plain, command=EOP | IFCS | IC_TSE, cso=20, css=14))
    driver.kick()
    sent = driver.machine.link.next()
    assert sent[:20] + sent[22:] == plain[:20] + plain[22:]
    assert int.from_bytes(sent[20:22], "big") == 0xFFFF - words_sum(plain[14:])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1, 1000, 1448, 1449, 60000])
def test_segmentation(driver, version, size):
    payload = random.Random(size).randbytes(size)
    packet, ip, tcp, header = tcp_packet(payload, version=version)
    mss, options = 1448, 3 if version == 4 else 2
    cut = header + size // 2
    driver.queue(
        context(ip, tcp, header, mss, version=version, command=4),
        driver.data(packet[:cut], 0, IFCS | IC_TSE, options),
        driver.data(packet[cut:], 0x10000, EOP | IFCS | IC_TSE | RS, options),
    )
    driver.kick()
    assert driver.wait() & TXDW and driver.is_sent(2) and driver.r(TDH) == 3
    count = -(-size // mss)
    whole = b""
    for number in range(count):
        sent = driver.machine.link.next()
        if number == count - 1:
            # Without what a short frame was padded with.
            sent = sent[: header + size - mss * number]
        part = sent[header:]
        assert len(part) == min(mss, size - mss * number)
        if version == 4:
            assert words_sum(sent[ip:tcp]) == 0xFFFF
            assert struct.unpack_from(">HH", sent, ip + 2) == (len(sent) - ip, 7 + number)
        else:
            assert struct.unpack_from(">H", sent, ip + 4)[0] == len(sent) - tcp
        length = len(sent) - tcp
        addresses = sent[ip + (12 if version == 4 else 8) : tcp]
        pseudo = addresses + struct.pack(">HH", length, 6)
        assert words_sum(pseudo + sent[tcp:]) == 0xFFFF
        (sequence,) = struct.unpack_from(">I", sent, tcp + 4)
        assert sequence == (0xFFFFF000 + len(whole)) % (1 << 32)
        last = number == count - 1
        assert sent[tcp + 13] == (0x19 if last else 0x10)
        whole += part
    assert whole == payload and driver.machine.link.sent.empty()


def test_checksum_offload_without_segmentation(driver):
    packet, ip, tcp, header = tcp_packet(b"abc")
    packet = bytearray(packet)
    packet[tcp + 16 : tcp + 18] = words_sum(
        packet[ip + 12 : tcp] + struct.pack(">HH", 23, 6)
    ).to_bytes(2, "big")
    driver.queue(context(ip, tcp, header, 0), driver.data(bytes(packet), options=2))
    driver.kick()
    sent = driver.machine.link.next()[: len(packet)]
    assert words_sum(sent[ip + 12 : tcp] + struct.pack(">HH", 23, 6) + sent[tcp:]) == 0xFFFF


def test_a_context_goes_with_its_packet(driver):
    """What is in front of the head is all that another device needs."""
    ip, tcp, header = tcp_packet(b"x" * 100)[1:]
    driver.queue(context(ip, tcp, header, 1448, command=4))
    driver.kick()
    driver.queue(driver.legacy(frame(1), 0x10000, IFCS))
    driver.kick()
    with driver.machine.nic.workers.quiet():
        assert driver.r(TDH) == 0
    driver.queue(driver.legacy(b"!" * 60, 0x20000))
    driver.kick()
    assert driver.machine.link.next() == frame(1) + b"!" * 60
    assert driver.wait() & TXDW and driver.r(TDH) == 3


def test_vlan_tags(machines):
    machine = machines()
    machine.map()
    driver = Driver(machine)
    driver.begin(rctl=BAM | SECRC | VFE, ctrl=1 << 30)
    driver.w(VET, 0x8100)
    driver.queue(driver.legacy(frame(1), command=EOP | IFCS | RS | VLE, special=0x2005))
    driver.kick()
    tagged = frame(1)[:12] + bytes.fromhex("81002005") + frame(1)[12:]
    assert machine.link.next() == tagged
    machine.link.deliver(tagged)
    machine.link.deliver(frame(2))
    assert driver.await_frames(1) == [frame(2)]
    driver.w(VFTA, 1 << 5)
    machine.link.deliver(tagged)
    while not driver.wait() & RXT0:
        pass
    raw = driver.memory[RX_RING + 16 : RX_RING + 32]
    assert raw[12] & 8 and raw[14:16] == bytes.fromhex("0520")
    assert driver.received() == [frame(1)]


def test_reception(driver):
    """More frames than buffers: nothing is lost, and nothing comes out of order."""
    frames = [frame(number, 60 + number) for number in range(50)]
    for each in frames:
        driver.machine.link.deliver(each)
    assert driver.await_frames(50) == frames
    assert driver.r(GPRC) == 50


def test_what_is_received_carries_its_crc_unless_it_is_stripped(machines):
    machine = machines()
    machine.map()
    driver = Driver(machine)
    driver.begin(rctl=BAM)
    short = frame(1, 30)
    machine.link.deliver(short)
    (got,) = driver.await_frames(1)
    padded = short.ljust(60, b"\0")
    assert got == padded + zlib.crc32(padded).to_bytes(4, "little")


def test_long_frames_go_over_several_buffers(machines):
    machine = machines()
    machine.map()
    driver = Driver(machine)
    driver.begin(rctl=BAM | LPE)
    big = frame(3, 9000)
    machine.link.deliver(big)
    driver.wait()
    assert driver.r(RDH) == 5
    assert driver.received() == [big + zlib.crc32(big).to_bytes(4, "little")]
    driver.w(RCTL, driver.r(RCTL) & ~LPE)
    machine.link.deliver(big)
    machine.link.deliver(frame(4))
    assert driver.await_frames(1)[0][:100] == frame(4)


@pytest.mark.parametrize(
    ("rctl", "destination", "wanted"),
    [
        (0, MAC, True),
        (0, PEER, False),
        (UPE, PEER, True),
        (0, b"\xff" * 6, False),
        (BAM, b"\xff" * 6, True),
        (BAM, bytes.fromhex("01005e000001"), False),
        (MPE, bytes.fromhex("01005e000001"), True),
        (0, bytes.fromhex("01005e7f1234"), True),
        (0, bytes.fromhex("525400000007"), True),
    ],
)
def test_filter(machines, rctl, destination, wanted):
    machine = machines()
    machine.map()
    driver = Driver(machine)
    driver.begin(rctl=rctl | SECRC)
    hashed = 0x3412 >> 4
    driver.w(MTA + 4 * (hashed >> 5), 1 << (hashed & 31))
    driver.w(RA + 8 * 15, int.from_bytes(bytes.fromhex("52540000"), "little"))
    driver.w(RA + 8 * 15 + 4, 0x80000700)
    sent = [frame(1, destination=destination), frame(2)]
    for each in sent:
        machine.link.deliver(each)
    expected = sent if wanted else sent[1:]
    assert driver.await_frames(len(expected)) == expected


def test_nothing_happens_without_bus_mastering_or_memory(machines):
    machine = machines()
    driver = Driver(machine)
    driver.begin()
    driver.port.write(CONFIG, 4, (3).to_bytes(2, "little"))
    driver.queue(driver.legacy(frame(1)))
    driver.kick()
    machine.link.deliver(frame(2))
    before = bytes(driver.memory)
    machine.map()
    machine.unmap()
    driver.port.write(CONFIG, 4, (7).to_bytes(2, "little"))
    with machine.nic.workers.quiet():
        assert bytes(driver.memory) == before and machine.link.sent.empty()
    assert driver.r(TDH) == driver.r(RDH) == 0
    machine.map()
    assert machine.link.next() == frame(1)
    assert driver.await_frames(1) == [frame(2)]


def test_a_client_that_comes_back_finds_everything_as_it_was(driver):
    machine = driver.machine
    driver.w(IMC, 0xFFFFFFFF)
    machine.link.deliver(frame(1))
    driver.w(IMS, RXT0)
    driver.wait()
    machine.nic.detached()
    driver.queue(driver.legacy(frame(2)))
    machine.link.deliver(frame(3))
    driver.kick()
    before = bytes(driver.memory)
    machine.nic.attached(object())
    assert bytes(driver.memory) == before
    flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
    machine.nic.set_irqs(SetIrqs(flags, 0, 0, 1), [os.dup(machine.line)])
    machine.map()
    assert machine.link.next() == frame(2)
    frames = driver.received()
    while len(frames) < 2:
        driver.wait()
        frames += driver.received()
    assert frames == [frame(1), frame(3)]


def test_disabling_a_direction_ends_its_dma(driver):
    driver.w(RCTL, driver.r(RCTL) & ~EN)
    driver.w(TCTL, driver.r(TCTL) & ~EN)
    driver.queue(driver.legacy(frame(1)))
    before = bytes(driver.memory)
    driver.kick()
    for _ in range(200):
        driver.machine.link.deliver(frame(2))
    with driver.machine.nic.workers.quiet():
        assert bytes(driver.memory) == before and driver.machine.link.sent.empty()
    driver.w(TCTL, driver.r(TCTL) | EN)
    assert driver.machine.link.next() == frame(1)


@pytest.mark.parametrize("seed", range(6))
def test_descriptors_of_rubbish_leave_the_device_alive(driver, seed):
    noise = random.Random(seed)
    packet = tcp_packet(b"y" * 3000)[0]
    for _ in range(40):
        kind = noise.randrange(5)
        if kind == 0:
            driver.queue(noise.randbytes(16))
        elif kind == 1:
            driver.queue(
                context(*(noise.randrange(230) for _ in range(3)), noise.randrange(4), command=4),
                driver.data(packet, command=EOP | IC_TSE | RS, options=3),
            )
        elif kind == 2:
            driver.queue(struct.pack("<QIBBH", noise.randrange(1 << 64), 0x0B1FFFFF, 0, 0, 0))
        elif kind == 3:
            driver.put(RX_RING + 16 * noise.randrange(driver.n), noise.randbytes(16))
            driver.machine.link.deliver(frame(1))
        else:
            first = noise.choice((TDBAL, RDBAL))
            driver.w(first + noise.choice((0, 4, 8, 0x10)), noise.randrange(1 << 32))
        driver.w(noise.choice((TDT, RDT)), noise.choice((driver.tail, noise.randrange(1 << 16))))
    driver.tail = driver.clean = 0
    driver.memory[TX_RING : RX_RING + 0x1000] = bytes(RX_RING + 0x1000)
    driver.begin()
    while not driver.machine.link.sent.empty():
        driver.machine.link.next()
    driver.queue(driver.legacy(frame(7)))
    driver.kick()
    while driver.machine.link.next() != frame(7):
        pass
    driver.machine.link.deliver(frame(8))
    while frame(8) not in driver.received():
        driver.wait()


def test_accesses_that_no_driver_makes(driver):
    nic = driver.machine.nic
    for size in (1, 2, 3, 8, 64):
        assert len(nic.region_read(BAR, 0xBE, size)) == size
        nic.region_write(BAR, 0xBD, bytes(size))
    nic.region_write(BAR, 0x1FFFC, b"\xff" * 4)
    nic.region_write(IO, 0, b"\xff" * 4)
    assert nic.region_read(IO, 0, 4) == (0x1FFFC).to_bytes(4, "little")
    nic.region_write(IO, 0x38, b"\xff" * 8)
    with pytest.raises(VfioUserError):
        nic.region_read(BAR, 0x1FFFE, 4)
    with pytest.raises(VfioUserError):
        nic.feature(Feature.get(1, 8))
    with pytest.raises(DeviceError):
        E1000(FakeLink(), b"\x01" * 6)


class Gateway:
    """Captures what the guest does, and executes batches in between."""

    def __init__(self, machine):
        self.machine = machine
        self.seq = None
        self.pending = b""

    def read(self, region, offset, size):
        data = self.machine.read(region, offset, size)
        self._note(Access(Op.READ, region, offset, size, data))
        return data

    def write(self, region, offset, data):
        self.machine.write(region, offset, data)
        self._note(Access(Op.WRITE, region, offset, len(data), data))

    def _note(self, access):
        if self.seq is not None:
            record = pack_access(access, self.seq)
            self.seq += len(record) // 32
            self.pending += record

    async def batch(self, records):
        out = b""
        for number, access in enumerate(unpack_accesses(records)):
            if access.op is Op.READ:
                data = self.machine.read(*access[1:4])
                access = access._replace(data=data)
            else:
                self.machine.write(access.region, access.offset, access.data)
            out += pack_access(access, number)
        return out

    async def journal(self, max_records=65536):
        taken, self.pending = self.pending, b""
        return taken, False


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def traffic(driver, numbers):
    """Both ways, and some more registers; what was received."""
    got = []
    for number in numbers:
        driver.queue(driver.legacy(frame(number, 60 + number), 2048 * (number % 16)))
        driver.kick()
        driver.machine.link.deliver(frame(1000 + number))
        assert driver.machine.link.next() == frame(number, 60 + number)
        while len(got) < number - numbers[0] + 1:
            driver.wait()
            got += driver.received()
        driver.w(MTA + 4 * (number % 128), number)
        driver.w(IMC, 0xFFFFFFFF)
        driver.w(IMS, TXDW | RXT0 | RXDMT0 | LSC)
        driver.phy(1)
    assert got == [frame(1000 + number) for number in numbers]


@pytest.mark.parametrize("during", [0, 1, 9, 45])
@pytest.mark.parametrize("resets", [False, True])
@trio_test
async def test_i4_a_driver_is_carried_over_in_the_middle_of_its_traffic(machines, during, resets):
    """By registers alone; some of it between snapshot and end, or nothing at all."""
    profiles = load_profiles()
    source = machines()
    source.map()
    target = machines(source.ram)
    gateways = Gateway(source), Gateway(target)
    driver = Driver(source, gateways[0])
    driver.begin()
    traffic(driver, range(1, 22))
    driver.w(IMS, 0x200)
    near = source_for(source.view(), gateways[0], profiles)
    far = target_for(await near.offer(), target.view(), gateways[1], profiles)
    await far.check()
    target.reset()
    values = await gateways[0].batch(await near.snapshot())
    gateways[0].seq = 0
    async for payload in near.begin(values, 0):
        await far.receive(payload)
    if resets:
        driver.tail = driver.clean = 0
        driver.memory[TX_RING : TX_RING + 256] = bytes(256)
        driver.begin()
    traffic(driver, range(100, 100 + during))
    async for payload in near.precopy():
        await far.receive(payload)
    # An interrupt that the guest has not seen, a frame that it has not read, a packet unsent.
    head = source.read(BAR, RDH, 4)
    source.link.deliver(frame(501))
    until(lambda: source.read(BAR, RDH, 4) != head)
    source.unmap()
    driver.queue(driver.legacy(frame(77)))
    driver.kick()
    frozen = bytes(driver.memory)
    async for payload in near.final():
        await far.receive(payload)
    target.map()
    report = await far.finish()
    assert report.divergences == {}
    with target.nic.workers.quiet():
        assert bytes(driver.memory) == frozen and target.link.sent.empty()
    assert not target.read(CONFIG, 4, 1)[0] & 4
    assert not (target.read(BAR, RCTL, 1)[0] | target.read(BAR, TCTL, 1)[0]) & EN
    pending = source.read(BAR, ICS, 4)
    started = list(unpack_accesses(far.start_records()))
    counts = {
        access.offset: int.from_bytes(access.data, "little") for access in started if access.owed
    }
    unread = during if resets else during + 21
    assert (counts.get(GPTC, 0), counts[GPRC]) == (unread, unread + 1)
    assert all(access.counts for access in started if access.owed)
    await gateways[1].batch(far.start_records())
    for first, last in (
        (MTA, MTA + 512),
        (RA, RA + 128),
        (IMS, IMS + 4),
        (RCTL, RCTL + 4),
        (TCTL, TCTL + 4),
        (TDT, TDT + 4),
        (RDH, RDT + 4),
    ):
        assert target.read(BAR, first, last - first) == source.read(BAR, first, last - first)
    assert target.link.next() == frame(77)
    driver.machine = driver.port = target
    assert int.from_bytes(pending, "little") & RXT0
    got = []
    while not got:
        causes = driver.wait()
        got = driver.received()
    assert got == [frame(501)] and causes & RXT0
    traffic(driver, range(200, 240))


def test_what_the_device_writes_is_logged(machines):
    machine = machines(logging_page_bytes=4096)
    machine.map()
    driver = Driver(machine)
    driver.begin()
    log = machine.nic.log
    log.start(4096, ())
    machine.link.deliver(frame(1, 1000))
    driver.await_frames(1)
    driver.queue(driver.legacy(frame(2)))
    driver.kick()
    driver.wait()
    bitmap = int.from_bytes(log.report(IOVA, RAM_BYTES, 4096), "little")
    pages = {page for page in range(RAM_BYTES // 4096) if bitmap >> page & 1}
    assert pages == {RX_RING // 4096, RX_DATA // 4096, TX_RING // 4096}
