"""Which eventfds are kept, and which are fired."""

import os
import select
from collections.abc import Callable, Iterator

import pytest

from sync.gateway.datapath.interrupts import Interrupts
from sync.vfio_user.protocol import IrqSet, PciIrq, SetIrqs

ASSIGN = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
DISABLE = IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER


class Wires:
    """Interrupts with eventfds of ours on the other side."""

    def __init__(self) -> None:
        self.interrupts = Interrupts()
        self.events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]

    def assign(self, index: int, start: int, *which: int) -> None:
        copies = [os.dup(self.events[number]) for number in which]
        self.interrupts.apply(SetIrqs(ASSIGN, index, start, len(which)), copies)

    def fired(self) -> list[int]:
        self.interrupts.fire_all()
        return [number for number, event in enumerate(self.events) if _count(event)]


def _count(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


@pytest.fixture
def wires(open_fds: Callable[[], int]) -> Iterator[Wires]:
    before = open_fds()
    wires = Wires()
    yield wires
    wires.interrupts.close()
    for event in wires.events:
        os.close(event)
    assert open_fds() == before


def test_every_vector_is_fired_once(wires: Wires) -> None:
    wires.assign(PciIrq.MSIX, 0, 0, 1, 2)
    assert wires.fired() == [0, 1, 2]
    assert _count(wires.events[0]) == 0


def test_a_vector_can_be_given_anew_and_taken_away(wires: Wires) -> None:
    wires.assign(PciIrq.MSIX, 0, 0, 1, 2)
    wires.assign(PciIrq.MSIX, 1, 5)
    assert wires.fired() == [0, 2, 5]
    wires.interrupts.apply(SetIrqs(ASSIGN, PciIrq.MSIX, 0, 1), [])
    assert wires.fired() == [2, 5]
    wires.interrupts.apply(SetIrqs(DISABLE, PciIrq.MSIX, 0, 0), [])
    assert wires.fired() == []


def test_intx_is_fired_only_without_a_message_signalled_vector(wires: Wires) -> None:
    wires.assign(PciIrq.INTX, 0, 0)
    assert wires.fired() == [0]
    wires.assign(PciIrq.MSIX, 0, 1)
    assert wires.fired() == [1]


def test_masking_changes_nothing_here(wires: Wires) -> None:
    wires.assign(PciIrq.INTX, 0, 0)
    mask = IrqSet.DATA_NONE | IrqSet.ACTION_MASK
    wires.interrupts.apply(SetIrqs(mask, PciIrq.INTX, 0, 0), [])
    eventfd = IrqSet.DATA_EVENTFD | IrqSet.ACTION_UNMASK
    copy = os.dup(wires.events[3])
    wires.interrupts.apply(SetIrqs(eventfd, PciIrq.INTX, 0, 1), [copy])
    assert wires.fired() == [0]


def test_i10_a_descriptor_that_would_block_is_passed_over(wires: Wires) -> None:
    full = os.eventfd(0)
    os.eventfd_write(full, (1 << 64) - 2)
    wires.interrupts.apply(SetIrqs(ASSIGN, PciIrq.MSIX, 0, 1), [full])
    wires.assign(PciIrq.MSIX, 1, 4)
    assert wires.fired() == [4]


def test_what_fires_at_a_tap_is_passed_on_and_counted() -> None:
    """Also what fires before the device has given its taps back, and to whom each one leads."""
    interrupts = Interrupts()
    vmm = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    taps = interrupts.tap([os.dup(descriptor) for descriptor in vmm])
    os.eventfd_write(taps[1], 5)
    assert select.select([interrupts.fileno()], [], [], 0)[0]
    interrupts.pass_on()
    assert interrupts.arrived == 1
    assert os.eventfd_read(vmm[1]) == 1
    os.eventfd_write(taps[2], 1)
    interrupts.close_taps()
    assert interrupts.arrived == 2
    assert os.eventfd_read(vmm[2]) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(vmm[0])
    interrupts.close()
    for descriptor in (*vmm, *taps):
        os.close(descriptor)


def test_without_room_for_taps_the_device_gets_what_the_vmm_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupts = Interrupts()
    given = [os.eventfd(0) for _ in range(2)]
    monkeypatch.setattr("sync.gateway.datapath.interrupts.MAX_VECTORS", 1)
    assert interrupts.tap(given) == given
    interrupts.close()
    for descriptor in given:
        os.close(descriptor)
