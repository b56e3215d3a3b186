"""The relay: whose message it is, with every interleaving of VMM, device and our own commands."""

import errno
import os
import struct
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies._internal.random import ArtificialRandom

from sync.gateway.datapath.dma import MAX_REGIONS
from sync.gateway.datapath.relay import MAX_OUTSTANDING, POSTED_ID, Relay, Send
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    HEADER,
    Command,
    DmaMap,
    DmaUnmap,
    IrqSet,
    RegionFlags,
    RegionInfo,
    RegionInfoRequest,
    RegionIoFds,
    RegionIoFdsRequest,
    SetIrqs,
    Version,
    encode_message,
)
from tests.sync.gateway.conftest import Bench

PAGE = 4096


def _message(number: int, command: int, body: bytes = b"", **options: bool) -> memoryview:
    return memoryview(bytearray(encode_message(number, command, body, **options)))


class Ends:
    """A relay with lists at both ends."""

    def __init__(self) -> None:
        self.device: list[bytes] = []
        self.vmm: list[bytes] = []
        self.relay = Relay(lambda data, fds: self.device.append(bytes(data)))
        self.relay.to_vmm = lambda data, fds: self.vmm.append(bytes(data))

    def from_vmm(
        self, number: int, command: int, body: bytes = b"", *, posted: bool = False
    ) -> None:
        flags = FLAG_NO_REPLY if posted else 0
        message = _message(number, command, body, no_reply=posted)
        self.relay.from_vmm(number, command, flags, 0, message, [])

    def device_replies(self, sent: bytes, body: bytes = b"") -> None:
        number, command, *_ = HEADER.unpack_from(sent)
        self.relay.from_device(
            number, command, 1, 0, _message(number, command, body, reply=True), []
        )


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.binary(max_size=8))), st.randoms())
@settings(deadline=None)
def test_every_reply_finds_its_way_with_any_ids_and_in_any_order(
    steps: list[tuple[bool, int, bytes]], random: ArtificialRandom
) -> None:
    """The VMM may use one id as often as it likes; our own commands go in between."""
    ends = Ends()
    mine: list[int] = []

    def note(number: int, *_: object) -> None:
        mine.append(number)

    for number, (ours, message_id, body) in enumerate(steps):
        if ours:
            ends.relay.ask(Command.DEVICE_FEATURE, body, (), partial(note, number))
        else:
            ends.from_vmm(message_id, Command.REGION_READ, body)
    ids = [HEADER.unpack_from(sent)[0] for sent in ends.device]
    assert len(set(ids)) == len(ids)
    assert [sent[2:] for sent in ends.device] == [
        encode_message(0, Command.DEVICE_FEATURE if ours else Command.REGION_READ, body)[2:]
        for ours, _, body in steps
    ]
    order = list(range(len(steps)))
    random.shuffle(order)
    expected_vmm = []
    for number in order:
        ours, message_id, _ = steps[number]
        answer = struct.pack("<I", number)
        ends.device_replies(ends.device[number], answer)
        if not ours:
            command = Command.REGION_READ
            expected_vmm.append(encode_message(message_id, command, answer, reply=True))
    assert ends.vmm == expected_vmm
    assert mine == [number for number in order if steps[number][0]]


def test_posted_commands_have_an_id_that_no_other_has() -> None:
    ends = Ends()
    ends.from_vmm(7, Command.REGION_WRITE, b"x" * 20, posted=True)
    posted = encode_message(POSTED_ID, Command.REGION_WRITE, b"x" * 20, no_reply=True)
    assert ends.device == [posted]
    ends.relay._last_id = POSTED_ID - 2
    for number in range(3):
        ends.from_vmm(number, Command.REGION_READ, bytes(16))
    ids = [int.from_bytes(sent[:2], "little") for sent in ends.device[1:]]
    assert ids == [POSTED_ID - 1, 0, 1]


@pytest.mark.parametrize("side", ["device", "vmm"])
def test_i9_a_reply_to_a_posted_command_is_dropped_and_is_nobody_elses(side: str) -> None:
    ends = Ends()
    ends.from_vmm(7, Command.REGION_READ, bytes(16))
    ends.from_vmm(7, Command.REGION_WRITE, b"x" * 20, posted=True)
    number = int.from_bytes(ends.device[1][:2], "little")
    take = ends.relay.from_device if side == "device" else ends.relay.from_vmm
    take(number, Command.REGION_WRITE, 1, 0, _message(number, Command.REGION_WRITE, reply=True), [])
    assert ends.vmm == []
    ends.device_replies(ends.device[0])
    assert [message[:2] for message in ends.vmm] == [(7).to_bytes(2, "little")]


def test_i9_what_a_handler_was_not_made_for_costs_one_message() -> None:
    ends = Ends()
    relay = ends.relay
    met: list[Exception] = []
    relay.on_defect = met.append

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    relay.vmm_commands = {Command.REGION_READ: broken}
    relay.device_command = broken
    ends.from_vmm(7, Command.REGION_READ, bytes(16))
    assert ends.vmm == [encode_message(7, Command.REGION_READ, reply=True, error=errno.EIO)]
    relay.ask(Command.DEVICE_RESET, b"", (), broken)
    ends.device_replies(ends.device[0])
    back: list[bytes] = []
    message = _message(5, Command.DMA_READ)
    relay.from_twin(5, Command.DMA_READ, 0, message, lambda data, _: back.append(bytes(data)))
    assert back == [encode_message(5, Command.DMA_READ, reply=True, error=errno.EIO)]
    assert [type(error) for error in met] == [ZeroDivisionError] * 3


def test_an_unknown_command_is_relayed_undecoded() -> None:
    ends = Ends()
    ends.from_vmm(7, 999, b"\xff" * 30)
    assert ends.device[0][2:] == encode_message(7, 999, b"\xff" * 30)[2:]


@pytest.mark.parametrize("side", ["device", "vmm"])
def test_a_reply_that_nobody_waits_for_is_a_protocol_error(side: str) -> None:
    ends = Ends()
    take = ends.relay.from_device if side == "device" else ends.relay.from_vmm
    with pytest.raises(ProtocolError):
        take(3, Command.REGION_READ, 1, 0, _message(3, Command.REGION_READ, reply=True), [])


def test_what_is_held_goes_on_in_order_and_replies_are_not_held() -> None:
    ends = Ends()
    relay = ends.relay

    def to_vmm(number: int, _: int, flags: int, message: memoryview, back: Send) -> None:
        relay.forward_to_vmm(number, flags, message, back)

    relay.device_command = to_vmm
    relay.hold()
    relay.hold()
    for number in range(3):
        ends.from_vmm(number, Command.REGION_READ, bytes([number]))
    assert ends.device == []
    relay.from_device(5, Command.DMA_READ, 0, 0, _message(5, Command.DMA_READ, b"?"), [])
    ours = HEADER.unpack_from(ends.vmm[0])[0]
    reply = _message(ours, Command.DMA_READ, b"!", reply=True)
    relay.from_vmm(ours, Command.DMA_READ, 1, 0, reply, [])
    assert ends.device == [encode_message(5, Command.DMA_READ, b"!", reply=True)]
    relay.let_go()
    assert len(ends.device) == 1
    relay.let_go()
    assert [sent[16:] for sent in ends.device[1:]] == [b"\0", b"\1", b"\2"]


def test_i9_what_a_vmm_may_have_under_way_is_bounded() -> None:
    ends = Ends()
    assert not ends.relay.vmm_blocked
    for _ in range(MAX_OUTSTANDING):
        ends.from_vmm(1, Command.REGION_READ)
    assert ends.relay.vmm_blocked
    ends.device_replies(ends.device[0])
    assert not ends.relay.vmm_blocked
    ends.relay.hold()
    for _ in range(MAX_OUTSTANDING):
        ends.from_vmm(1, Command.REGION_WRITE, posted=True)
    assert ends.relay.vmm_blocked


def test_a_held_command_that_is_nonsense_is_reported_as_the_vmms_fault(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    relay = bench.link.relay
    relay.hold()
    bench.vmm(Command.DMA_MAP, b"short")
    bench.vmm(Command.REGION_READ, bytes(16))
    relay.let_go()
    assert isinstance(relay.vmm_error, ProtocolError)
    assert not bench.to_device, "nothing behind it is executed"


# --- set-up commands, in passthrough ---


def test_a_region_is_described_without_the_offer_to_map_it(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    assert bench.link.facts.regions[0].flags & RegionFlags.MMAP, "the device does offer it"
    error, body = bench.ask(Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(0).pack())
    info = RegionInfo.unpack(body)
    assert error == 0
    assert info.flags == RegionFlags.READ | RegionFlags.WRITE
    assert info.size == 4096


@pytest.mark.parametrize("flags", [0xF, 0x7, 0xFFFF_FFF7, 0xB])
def test_only_the_offer_to_map_is_taken_from_a_region(
    make_bench: Callable[..., Bench], flags: int
) -> None:
    """A reply with a capability chain says so in its flags, also without the offer; and a bit that
    is not known here is somebody else's."""
    bench = make_bench()
    real = bench.device._execute

    def described(command: int, body: bytes, n_descriptors: int) -> bytes:
        reply = bytearray(real(command, body, n_descriptors))
        if command == Command.DEVICE_GET_REGION_INFO:
            reply[4:8] = flags.to_bytes(4, "little")
        return bytes(reply)

    bench.device._execute = described  # type: ignore[method-assign]
    _, body = bench.ask(Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(0).pack())
    assert int.from_bytes(body[4:8], "little") == flags & 0xFFFF_FFFB


def test_no_more_memory_is_promised_than_is_held(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    assert bench.device.capabilities.max_dma_maps > MAX_REGIONS
    answer = bench.link.attach_vmm(bench._to_vmm, Version())
    assert answer.capabilities.max_dma_maps == MAX_REGIONS
    for number in range(MAX_REGIONS):
        assert bench.link.memory.add(DmaMap(3, 0, number * PAGE, PAGE), None)


def test_there_are_no_io_descriptors_for_the_vmm(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    request = RegionIoFdsRequest(2).pack()
    error, body = bench.ask(Command.DEVICE_GET_REGION_IO_FDS, request)
    assert (error, body) == (0, RegionIoFds(2).pack())
    assert bench.device.commands == []


def test_a_second_version_is_a_protocol_error(make_bench: Callable[..., Bench]) -> None:
    with pytest.raises(ProtocolError):
        make_bench().vmm(Command.VERSION, Version().pack())


def test_memory_is_shared_with_its_descriptor_and_can_be_taken_back(
    make_bench: Callable[..., Bench], open_fds: Callable[[], int]
) -> None:
    bench = make_bench()
    before = open_fds()
    fd = bench.share(0x10000, PAGE)
    assert bench.device.mapped == {0x10000: (DmaMap(3, 0, 0x10000, PAGE), True)}
    error, _ = bench.ask(Command.DMA_MAP, DmaMap(3, 0, 0x10800, PAGE).pack(), fds=(fd,))
    assert error == errno.EEXIST
    error, body = bench.ask(Command.DMA_UNMAP, DmaUnmap(0, 0x10000, PAGE).pack())
    assert (error, DmaUnmap.unpack(body)) == (0, DmaUnmap(0, 0x10000, PAGE))
    assert bench.ask(Command.DMA_UNMAP, DmaUnmap(0, 0x10000, PAGE).pack())[0] == errno.ENOENT
    assert bench.device.mapped == {}
    os.close(fd)
    assert open_fds() == before


def test_memory_that_the_device_refuses_is_not_kept(
    make_bench: Callable[..., Bench], open_fds: Callable[[], int]
) -> None:
    bench = make_bench()
    before = open_fds()
    bench.device.refuse[Command.DMA_MAP] = errno.ENOMEM
    fd = os.memfd_create("ram")
    os.ftruncate(fd, PAGE)
    error, _ = bench.ask(Command.DMA_MAP, DmaMap(3, 0, 0, PAGE).pack(), fds=(fd,))
    assert error == errno.ENOMEM
    assert bench.link.memory.regions == []
    os.close(fd)
    assert open_fds() == before


def test_unmap_and_map_may_be_pipelined(make_bench: Callable[..., Bench]) -> None:
    """As QEMU does it: the next command does not wait for the answer to the one before."""
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    unmap = bench.vmm(Command.DMA_UNMAP, DmaUnmap(0, 0x10000, PAGE).pack())
    remap = bench.vmm(Command.DMA_MAP, DmaMap(3, 0, 0x10000, 2 * PAGE).pack())
    bench.settle()
    assert bench.reply_to(unmap)[0] == 0
    assert bench.reply_to(remap)[0] == 0
    assert [r.request.size for r in bench.link.memory.regions] == [2 * PAGE]
    os.close(fd)


def test_all_regions_can_be_taken_back_at_once(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    fds = [bench.share(0x10000, PAGE), bench.share(0x20000, PAGE)]
    error, _ = bench.ask(Command.DMA_UNMAP, DmaUnmap(2, 0, 0).pack())
    assert error == 0
    assert bench.link.memory.regions == []
    assert bench.device.mapped == {}
    for fd in fds:
        os.close(fd)


def test_posted_set_up_commands_are_followed_and_not_answered(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    bench.vmm(Command.DMA_MAP, DmaMap(3, 0, 0x10000, PAGE).pack(), posted=True)
    bench.vmm(Command.DEVICE_GET_REGION_INFO, RegionInfoRequest(0).pack(), posted=True)
    bench.settle()
    assert len(bench.link.memory.regions) == 1
    assert bench.to_vmm == []


@given(
    st.sampled_from([Command.DMA_MAP, Command.DMA_UNMAP, Command.DEVICE_SET_IRQS, 6, 5, 1]),
    st.binary(max_size=48),
    st.integers(0, 3),
    st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i9_no_bytes_of_a_vmm_leak_a_descriptor_or_break_the_relay(
    make_bench: Callable[..., Bench],
    open_fds: Callable[[], int],
    command: int,
    body: bytes,
    n_fds: int,
    posted: bool,
) -> None:
    fd = os.memfd_create("ram")
    before = open_fds()
    bench = make_bench()
    try:
        bench.vmm(command, body, posted=posted, fds=(fd,) * n_fds)
        bench.settle()
    except ProtocolError:
        pass
    else:
        assert not bench.link.relay.holding
    bench.close()
    assert open_fds() == before
    os.close(fd)


def test_interrupts_are_passed_on_and_kept(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    assign = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 1, 2)
    bench.vmm(Command.DEVICE_SET_IRQS, assign.pack(), fds=tuple(events))
    assert bench.to_device[0][1] == 2, "both descriptors go to the device"
    bench.settle()
    assert bench.link.interrupts.fire_all() == 2
    assert [os.eventfd_read(event) for event in events] == [1, 1]
    for event in events:
        os.close(event)
