"""What a gateway hands on arrives as it was, and a shape that changes has another version."""

import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest

from sync.gateway.control.info import Recovery, VmmConnection
from sync.gateway.datapath.dma import AtDevice
from sync.gateway.datapath.peer import LOST, Peer
from sync.gateway.engine import jobs
from sync.gateway.engine.custody import Custody
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.inheritance import (
    STATE_VERSION,
    Estate,
    Inherited,
    Link,
    Listening,
    State,
    from_bytes,
    furnish,
    own,
    ownership,
    to_bytes,
)
from sync.gateway.errors import UpgradeFailed
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    Command,
    IrqSet,
    RegionAccess,
    SetIrqs,
    encode_message,
)
from tests.sync.gateway.conftest import Bench

PAGE = 4096
SHAPES = {1: "8409b0552d5427ab"}
"""By version, a digest of every shape. A shape that changes is another version."""


def _nowhere(message: object, descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _shapes(shape: Any, found: dict[str, str]) -> dict[str, str]:
    if is_dataclass(shape) and shape.__name__ not in found:
        hints = get_type_hints(shape)
        found[shape.__name__] = ", ".join(
            f"{field.name}: {hints[field.name]}" for field in fields(shape)
        )
        for hint in hints.values():
            _shapes(hint, found)
    for argument in get_args(shape):
        _shapes(argument, found)
    return found


def test_a_shape_that_changes_has_another_version() -> None:
    text = repr(sorted(_shapes(State, {}).items()))
    assert SHAPES.get(STATE_VERSION) == hashlib.sha256(text.encode()).hexdigest()[:16], (
        "raise STATE_VERSION, and enter this digest"
    )


def _state(custody: Custody, link: Link | None) -> State:
    return State(
        vmm_path="/run/vmm",
        control_path="/run/control",
        device_path="/run/device",
        device_path_now="/run/other",
        vmm_listener=Listening(-1, (7, 8)),
        control_listener=Listening(-1, None),
        records=-1,
        ownership=ownership(custody),
        last_recovery=Recovery("lease-lost", True, "cont"),
        vmm=VmmConnection("/run/vmm", 7, 8, 9, 10),
        orphaned=True,
        generation=5,
        held_since=1.5,
        link=link,
    )


def _new_link() -> DeviceLink:
    return DeviceLink(_nowhere, lambda: 0.0, deadline_s=5.0, journal_records=64, generation=1)


@pytest.mark.parametrize("state", ["passthrough", "shut"])
def test_a_link_stands_where_the_other_stood(
    make_bench: Callable[..., Bench], open_fds: Callable[[], int], state: str
) -> None:
    before = open_fds()
    bench = make_bench()
    link, custody = bench.link, bench.custody
    for address, flags, shared in ((0x10000, 3, True), (0x20000, 1, True), (0x40000, 3, False)):
        fd = bench.share(address, 2 * PAGE, flags=flags, fd=shared)
        if shared:
            os.close(fd)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    assign = SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 2, 3, 1)
    assert bench.ask(Command.DEVICE_SET_IRQS, assign.pack(), fds=(event,))[0] == 0
    link.deferred.add(0, 16, b"\x05\x00")
    link.deferred.add(0, 32, b"\x02\x00\x00\x00", count=True)
    question = memoryview(bytearray(encode_message(77, Command.DMA_READ, bytes(16))))
    assert link.relay.forward_to_vmm(77, 0, question, link.relay.to_device)
    if state == "shut":
        custody.mediate("s")
        bench.job(jobs.stop(link, custody, fence=True, resume=b""), held=True)
        custody.release("s")
    link.enter(custody.state, shut=custody.shut)
    if state == "shut":
        bench.vmm(Command.REGION_WRITE, RegionAccess(0, 0, 4, b"drop").pack())
        assert link.gate.dropped == 1
    estate = Estate()
    given = _state(custody, estate.link(link, None))
    arrived = from_bytes(to_bytes(given))
    assert arrived == given

    heir = Inherited(arrived, [os.dup(each) for each in estate.files])
    new, new_custody = _new_link(), Custody()
    own(new_custody, arrived.ownership)
    assert arrived.link is not None
    furnish(new, arrived.link, new_custody, heir, _nowhere, ())
    assert all(each < 0 for each in heir.files), "every descriptor has an owner"
    assert ownership(new_custody) == ownership(custody)
    again = Estate()
    assert again.link(new, None) == given.link
    assert [os.fstat(n).st_ino for n in again.files] == [os.fstat(n).st_ino for n in estate.files]
    assert [region.at_device for region in new.memory.regions] == [
        region.at_device for region in link.memory.regions
    ]
    assert new.relay.vmm_commands.keys() == link.relay.vmm_commands.keys()
    if state == "passthrough":
        assert new.memory.regions[0].at_device is AtDevice.DIRECT
        assert new.interrupts.fire_all() == 1
        assert os.eventfd_read(event) == 1
    new.close()
    bench.close()
    os.close(event)
    assert open_fds() == before


def test_what_has_to_end_first_is_refused(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.vmm(Command.REGION_READ, RegionAccess(0, 0, 4).pack())
    with pytest.raises(UpgradeFailed, match="has not answered"):
        Estate().link(bench.link, None)
    bench.settle()
    question = memoryview(bytearray(encode_message(1, Command.DMA_READ, bytes(16))))
    assert bench.link.relay.forward_to_vmm(1, 0, question, _nowhere)
    with pytest.raises(UpgradeFailed, match="large access"):
        Estate().link(bench.link, None)


def test_a_stream_goes_on_in_the_middle_of_a_message_and_with_what_was_held(
    make_bench: Callable[..., Bench],
) -> None:
    """In order: commands that were held, with their descriptors and with those that were lost, and
    the half of one that has just begun."""
    bench = make_bench()
    ram = os.memfd_create("ram")
    ours, vmm = socket.socketpair()
    seen: list[tuple[int, int, int]] = []

    def handler(
        message_id: int,
        command: int,
        flags: int,
        error: int,
        message: memoryview,
        descriptors: list[int],
    ) -> None:
        seen.append((message_id, error, len(descriptors)))
        _nowhere(message, descriptors)

    old = Peer(ours, 1 << 16, handler)
    bench.link.relay.hold()
    first = encode_message(1, Command.REGION_WRITE, bytes(20), no_reply=True)
    relay = bench.link.relay
    relay.from_vmm(1, 10, FLAG_NO_REPLY, 0, memoryview(bytearray(first)), [])
    second = memoryview(bytearray(encode_message(2, Command.DMA_MAP, bytes(32))))
    relay.from_vmm(2, Command.DMA_MAP, 0, 0, second, [os.dup(ram)])
    third = memoryview(bytearray(encode_message(3, Command.DMA_MAP, bytes(32))))
    relay.from_vmm(3, Command.DMA_MAP, 0, 24, third, [])
    fourth = encode_message(4, Command.REGION_READ, bytes(16))
    vmm.sendall(fourth[:20])
    old.receive()
    old.send(b"out ", ())
    estate = Estate()
    given = estate.connection(old, relay.held())
    assert [part.files for part in given.arrived] == [(), (1,), (LOST,), ()]
    heir = Inherited(
        replace(_state(Custody(), None), vmm_connection=given),
        [os.dup(each) for each in estate.files],
    )
    new = Peer(socket.socket(fileno=heir.file(given.socket)), 1 << 16, handler)
    new.take(heir.chunks(given.arrived), heir.chunks(given.leaving))
    assert seen == []
    new.deliver()
    new.drain()
    assert vmm.recv(100) == b"out "
    vmm.sendall(fourth[20:])
    new.receive()
    assert seen == [(1, 0, 0), (2, 0, 1), (3, 24, 0), (4, 0, 0)]
    os.close(ram)
    old.close()
    new.close()
    vmm.close()
