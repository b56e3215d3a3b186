"""The other end of a guest's network, without a guest."""

import socket
import struct
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from lab.devices.e1000.offload import ones_sum
from lab.qemu.errors import LanUnavailable
from lab.qemu.lan import (
    GUEST_ADDRESS,
    PEER_ADDRESS,
    Ping,
    echo_request,
    is_echo_reply,
    open_lan,
    parse_snmp,
)
from tests.qemu.moving import unable

GUEST_MAC = bytes.fromhex("525400123456")
ARP = 0x0806
DEADLINE_S = 30.0
SNMP = """\
Icmp: InMsgs InErrors InCsumErrors
Icmp: 7 1 2
Tcp: RtoAlgorithm InSegs InCsumErrors
Tcp: 1 4711 3
"""


def arp(operation: int, sender: bytes, sender_mac: bytes, target: bytes) -> bytes:
    """A frame of RFC 826."""
    head = struct.pack("!6s6sHHHBBH", b"\xff" * 6, sender_mac, ARP, 1, 0x0800, 6, 4, operation)
    return head + sender_mac + sender + bytes(6) + target


def test_counters_are_found_by_their_names() -> None:
    counters = parse_snmp(SNMP)
    assert counters["Icmp", "InCsumErrors"] == 2
    assert counters["Tcp", "InCsumErrors"] == 3


@given(st.integers(0, 1 << 20))
def test_an_echo_request_has_the_right_checksum(number: int) -> None:
    assert ones_sum(echo_request(number)) == 0xFFFF


def test_only_an_answer_counts_as_one() -> None:
    header = bytes([0x45]) + bytes(19)
    question = echo_request(1)
    assert is_echo_reply(header + b"\0" + question[1:])
    assert not is_echo_reply(header + question)
    assert not is_echo_reply(header + b"\0" + bytes(7))


@given(st.lists(st.floats(0.0, 100.0), max_size=20))
def test_the_gap_is_the_longest_time_between_two_answers(pauses: list[float]) -> None:
    ping, now = Ping(), 1000.0
    ping.answer(now)
    for pause in pauses:
        now += pause
        ping.answer(now)
    assert ping.longest_gap_s == pytest.approx(max(pauses, default=0.0), abs=1e-6)
    assert ping.answered == len(pauses) + 1


def test_the_peer_answers_on_the_hub(short_path: Path) -> None:
    """A frame of ours reaches its stack, and its answer, and its pings' questions, reach us."""
    ours, theirs = (socket.inet_aton(text) for text in (GUEST_ADDRESS, PEER_ADDRESS))

    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with open_lan(short_path / "hub") as peer:
                with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as port:
                    await port.connect(str(short_path / "hub"))
                    await port.send(arp(1, ours, GUEST_MAC, theirs))
                    while True:
                        frame = await port.recv(2048)
                        if frame[:6] == GUEST_MAC and frame[20:22] == b"\0\2":
                            break
                    assert frame[28:32] == theirs
                    while True:
                        frame = await port.recv(2048)
                        if frame[12:14] == b"\x08\0" and frame[23] == socket.IPPROTO_ICMP:
                            break
                    assert frame[26:34] == theirs + ours
                assert peer.wrong_checksums() == 0

    try:
        trio.run(main)
    except LanUnavailable as error:
        unable(str(error))
    assert not (short_path / "hub").exists()
