"""INTx as a level with automatic mask, MSI-X as messages."""

import os
from collections.abc import Iterator

import pytest

from lab.devices.interrupts import Interrupts, MsixTable
from sync.vfio_user.protocol import IrqSet, SetIrqs, VfioUserError

INTX, MSI, MSIX, ERR, REQ = range(5)
NONE, BOOL, EVENTFD = IrqSet.DATA_NONE, IrqSet.DATA_BOOL, IrqSet.DATA_EVENTFD
TRIGGER, MASK, UNMASK = IrqSet.ACTION_TRIGGER, IrqSet.ACTION_MASK, IrqSet.ACTION_UNMASK


class Listener:
    """An eventfd of which the device gets a copy."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)

    def copy(self) -> int:
        return os.dup(self.fd)

    def count(self) -> int:
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    interrupts = Interrupts(3)
    yield interrupts
    interrupts.disconnect()


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    made = [Listener() for _ in range(3)]
    yield made
    for listener in made:
        os.close(listener.fd)


def test_what_there_is(interrupts: Interrupts) -> None:
    counts = [interrupts.info(index).count for index in range(5)]
    assert counts == [1, 0, 3, 0, 0]
    assert interrupts.info(INTX).flags == 0b111
    with pytest.raises(VfioUserError):
        interrupts.info(5)


def test_the_line_masks_itself_until_it_is_unmasked(
    interrupts: Interrupts, listeners: list[Listener]
) -> None:
    line = listeners[0]
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, INTX, 0, 1), [line.copy()])
    interrupts.set_level(True)
    interrupts.set_level(False)
    interrupts.set_level(True)
    assert line.count() == 1
    interrupts.set_irqs(SetIrqs(NONE | UNMASK, INTX, 0, 1), [])
    assert line.count() == 1
    interrupts.set_level(False)
    interrupts.set_irqs(SetIrqs(BOOL | UNMASK, INTX, 0, 1, b"\1"), [])
    assert line.count() == 0
    interrupts.set_level(True)
    assert line.count() == 1


def test_a_line_that_is_masked_on_purpose(
    interrupts: Interrupts, listeners: list[Listener]
) -> None:
    line = listeners[0]
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, INTX, 0, 1), [line.copy()])
    interrupts.set_irqs(SetIrqs(NONE | MASK, INTX, 0, 1), [])
    interrupts.set_level(True)
    interrupts.set_irqs(SetIrqs(BOOL | UNMASK, INTX, 0, 1, b"\0"), [])
    assert line.count() == 0
    interrupts.set_irqs(SetIrqs(NONE | UNMASK, INTX, 0, 1), [])
    assert line.count() == 1


def test_an_asserted_line_fires_when_somebody_begins_to_listen(
    interrupts: Interrupts, listeners: list[Listener]
) -> None:
    interrupts.set_level(True)
    for listener in listeners:
        interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, INTX, 0, 1), [listener.copy()])
        assert listener.count() == 1
    interrupts.set_irqs(SetIrqs(NONE | TRIGGER, INTX, 0, 0), [])
    interrupts.set_level(False)
    interrupts.set_level(True)
    assert [listener.count() for listener in listeners] == [0, 0, 0]


def test_vectors_are_kept_for_who_listens_later(
    interrupts: Interrupts, listeners: list[Listener]
) -> None:
    interrupts.signal(1)
    interrupts.signal(1)
    interrupts.signal(2)
    assert interrupts.pending() == {1, 2}
    fds = [listener.copy() for listener in listeners[:2]]
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, MSIX, 0, 2), fds)
    assert [listener.count() for listener in listeners] == [0, 1, 0]
    assert interrupts.pending() == {2}
    interrupts.signal(0)
    assert [listener.count() for listener in listeners] == [1, 0, 0]
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, MSIX, 0, 2), [])
    interrupts.signal(0)
    assert interrupts.pending() == {0, 2}
    interrupts.set_pending(frozenset({1}))
    assert interrupts.pending() == {1}


def test_msix_is_configured_even_without_a_descriptor(interrupts: Interrupts) -> None:
    assert not interrupts.msix_configured
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, MSIX, 0, 1), [])
    assert interrupts.msix_configured
    interrupts.set_irqs(SetIrqs(NONE | TRIGGER, MSIX, 0, 0), [])
    assert not interrupts.msix_configured


def test_a_client_can_have_its_own_eventfds_fired(
    interrupts: Interrupts, listeners: list[Listener]
) -> None:
    fds = [listener.copy() for listener in listeners]
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, MSIX, 0, 3), fds)
    interrupts.set_irqs(SetIrqs(NONE | TRIGGER, MSIX, 1, 2), [])
    interrupts.set_irqs(SetIrqs(BOOL | TRIGGER, MSIX, 0, 3, b"\0\0\1"), [])
    assert [listener.count() for listener in listeners] == [0, 1, 2]


def test_descriptors_are_closed_when_they_are_replaced_and_at_the_end(
    interrupts: Interrupts,
) -> None:
    reader, writer = os.pipe()
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, MSIX, 0, 1), [writer])
    other = os.eventfd(0)
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, MSIX, 0, 1), [other])
    assert os.read(reader, 1) == b""
    os.close(reader)
    interrupts.disconnect(frozenset({2}))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(other)
    assert interrupts.pending() == {2}


def test_i9_a_descriptor_that_would_block_or_breaks_does_no_harm(interrupts: Interrupts) -> None:
    full = os.eventfd(0)
    os.eventfd_write(full, (1 << 64) - 2)
    reader, broken = os.pipe()
    os.close(reader)
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, MSIX, 0, 2), [full, broken])
    interrupts.signal(0)
    interrupts.signal(1)
    assert os.eventfd_read(full) == (1 << 64) - 2


def test_reset_keeps_the_listeners(interrupts: Interrupts, listeners: list[Listener]) -> None:
    interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, INTX, 0, 1), [listeners[0].copy()])
    interrupts.set_level(True)
    interrupts.signal(1)
    interrupts.reset()
    assert interrupts.pending() == frozenset()
    interrupts.set_level(True)
    assert listeners[0].count() == 2


@pytest.mark.parametrize(
    "request_",
    [
        SetIrqs(NONE | TRIGGER, 7, 0, 1),
        SetIrqs(NONE | TRIGGER, MSIX, 2, 2),
        SetIrqs(NONE | TRIGGER, MSI, 0, 1),
        SetIrqs(NONE | MASK, MSIX, 0, 1),
        SetIrqs(EVENTFD | UNMASK, INTX, 0, 1),
        SetIrqs(NONE | UNMASK, INTX, 0, 0),
    ],
)
def test_what_is_refused(interrupts: Interrupts, request_: SetIrqs) -> None:
    with pytest.raises(VfioUserError):
        interrupts.set_irqs(request_, [])


def test_descriptors_of_a_refused_request_stay_the_callers(
    interrupts: Interrupts, listeners: list[Listener]
) -> None:
    with pytest.raises(VfioUserError):
        interrupts.set_irqs(SetIrqs(EVENTFD | TRIGGER, MSIX, 0, 2), [listeners[0].fd])
    with pytest.raises(VfioUserError):
        interrupts.set_irqs(SetIrqs(NONE | TRIGGER, MSIX, 0, 1), [listeners[0].fd])
    assert listeners[0].count() == 0


def test_the_msix_table_is_memory_with_reserved_bits() -> None:
    table = MsixTable(2)
    assert table.read(0, 16) == bytes(12) + b"\1\0\0\0"
    table.write(0, b"\xff" * 40)
    assert table.read(0, 32) == (b"\xfc" + b"\xff" * 11 + b"\1\0\0\0") * 2
    table.write(12, b"\0")
    assert table.read(12, 1) == b"\0"
    table.reset()
    assert table.read(0, 32) == (bytes(12) + b"\1\0\0\0") * 2
