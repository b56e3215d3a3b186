"""The 8254x NIC receives: buffers, CRC, filters."""

import zlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.lab.devices.e1000_driver import (
    BAM,
    GPRC,
    LPE,
    MAC,
    MPE,
    MTA,
    PEER,
    RA,
    RCTL,
    RDH,
    SECRC,
    UPE,
    Driver,
    frame,
)


def test_reception(driver: Driver) -> None:
    """More frames than buffers: nothing is lost, and nothing comes out of order."""
    frames = [frame(number, 60 + number) for number in range(50)]
    for each in frames:
        driver.machine.link.deliver(each)
    assert driver.await_frames(50) == frames
    assert driver.r(GPRC) == 50


def test_what_is_received_carries_its_crc_unless_it_is_stripped(
    machines: Callable[..., Any],
) -> None:
    machine = machines()
    machine.map()
    driver = Driver(machine)
    driver.begin(rctl=BAM)
    short = frame(1, 30)
    machine.link.deliver(short)
    (got,) = driver.await_frames(1)
    padded = short.ljust(60, b"\0")
    assert got == padded + zlib.crc32(padded).to_bytes(4, "little")


def test_long_frames_go_over_several_buffers(machines: Callable[..., Any]) -> None:
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
def test_filter(machines: Callable[..., Any], rctl: int, destination: bytes, wanted: bool) -> None:
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
