"""The 8254x NIC sends: descriptors, segmentation, checksums, VLAN tags."""

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.devices.e1000_driver import (
    BAM,
    EOP,
    GPTC,
    IC_TSE,
    IFCS,
    RS,
    RX_RING,
    SECRC,
    TDH,
    TOTH,
    TOTL,
    TX_RING,
    TXDW,
    VET,
    VFE,
    VFTA,
    VLE,
    Driver,
    context,
    frame,
    tcp_packet,
    words_sum,
)


def test_legacy_transmission(driver: Driver) -> None:
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


def test_short_frames_are_padded_and_legacy_checksums_inserted(driver: Driver) -> None:
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
def test_segmentation(driver: Driver, version: int, size: int) -> None:
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


def test_checksum_offload_without_segmentation(driver: Driver) -> None:
    packet, ip, tcp, header = tcp_packet(b"abc")
    changed = bytearray(packet)
    changed[tcp + 16 : tcp + 18] = words_sum(
        packet[ip + 12 : tcp] + struct.pack(">HH", 23, 6)
    ).to_bytes(2, "big")
    driver.queue(context(ip, tcp, header, 0), driver.data(bytes(changed), options=2))
    driver.kick()
    sent = driver.machine.link.next()[: len(packet)]
    assert words_sum(sent[ip + 12 : tcp] + struct.pack(">HH", 23, 6) + sent[tcp:]) == 0xFFFF


def test_a_context_goes_with_its_packet(driver: Driver) -> None:
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


def test_vlan_tags(machines: Callable[..., Any]) -> None:
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
    # Its descriptor says that it is done: the interrupt may still be that of the frame before.
    while not driver.memory[RX_RING + 28] & 1:
        driver.wait()
    raw = driver.memory[RX_RING + 16 : RX_RING + 32]
    assert raw[12] & 8 and raw[14:16] == bytes.fromhex("0520")
    assert driver.received() == [frame(1)]
