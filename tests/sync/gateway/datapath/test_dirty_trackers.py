"""The dirty trackers of a mediated device, stepped by hand."""

import errno
import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.vfio_user.access import DmaAccess
from sync.gateway.engine import jobs
from sync.gateway.engine.custody import CustodyState
from sync.gateway.errors import (
    DeviceRefused,
    LayoutUnaligned,
    Unsupported,
    WrongState,
)
from sync.vfio_user.protocol import (
    Command,
    FeatureIndex,
)
from tests.sync.gateway.conftest import Bench
from tests.sync.gateway.mediation import (
    PAGE,
    guest_read,
    mediate,
    mediating,
    restore,
    take_dirty_pages,
)


@given(st.lists(st.tuples(st.integers(0, 8 * PAGE - 1), st.integers(1, 3 * PAGE)), max_size=20))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i1_the_message_tracker_marks_exactly_the_pages_written(
    make_bench: Callable[..., Bench], writes: list[tuple[int, int]]
) -> None:
    bench = make_bench()
    fds = [bench.share(0x10000, 5 * PAGE), bench.share(0x10000 + 5 * PAGE, 3 * PAGE)]
    mediate(bench, "message")
    expected: set[int] = set()
    for offset, count in writes:
        count = min(count, 8 * PAGE - offset)
        body = DmaAccess(0x10000 + offset, count, b"\1" * count).pack()
        assert bench.dma(Command.DMA_WRITE, body)[0] == 0
        expected |= {place // PAGE for place in range(offset, offset + count)}
        assert bench.dma(Command.DMA_READ, DmaAccess(0x10000, PAGE).pack())[0] == 0
    assert take_dirty_pages(bench) == expected
    assert take_dirty_pages(bench) == set()
    for fd in fds:
        os.close(fd)
    bench.close()


def test_the_message_tracker_takes_the_descriptors_away_and_gives_them_back(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    bench.share(0x80000, PAGE, fd=False)
    number = guest_read(bench, 0)
    mediated = mediate(bench, "message")
    assert bench.reply_to(number)[0] == 0
    assert (mediated.n_pages, mediated.half_bytes) == (1, 8)
    mapped = {a: has_fd for a, (_, has_fd) in bench.device.mapped.items()}
    assert mapped == {0x10000: False, 0x80000: False}
    assert bench.device.commands.count(Command.DMA_UNMAP) == 1, "the other had none to take"
    late = bench.share(0x20000, PAGE)
    assert bench.device.mapped[0x20000][1] is False
    assert bench.link.memory.generation == mediated.layout_generation + 1
    restore(bench)
    mapped = {a: has_fd for a, (_, has_fd) in bench.device.mapped.items()}
    assert mapped == {0x10000: True, 0x20000: True, 0x80000: False}
    assert bench.custody.state is CustodyState.PASSTHROUGH
    for number in (fd, late):
        os.close(number)


def test_a_device_that_drains_on_unmap_is_served_meanwhile(
    make_bench: Callable[..., Bench],
) -> None:
    """It asks for guest memory before it lets go of it, while the guest is held back."""
    bench = make_bench()
    fd = bench.share(0x10000, PAGE)
    outcome = bench.start(
        mediating(bench, "message"),
        held=True,
    )
    held = guest_read(bench, 0)
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x10010, 4, b"late").pack())[0] == 0
    assert bench.step(), "the unmap"
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x10020, 4, b"more").pack())[0] == 0
    bench.settle()
    assert outcome[0][1] is None
    assert bench.reply_to(held)[0] == 0
    assert os.pread(fd, 4, 0x10) == b"late"
    assert take_dirty_pages(bench) == {0}
    os.close(fd)


def test_a_remap_that_the_device_refuses_is_undone(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    fds = [bench.share(0x10000, PAGE), bench.share(0x20000, PAGE)]
    device = bench.device
    execute = device._execute

    def refuse_one(command: int, body: bytes, n_descriptors: int) -> bytes:
        if command == Command.DMA_MAP and not n_descriptors:
            device.refuse[Command.DMA_MAP] = errno.EINVAL
        return execute(command, body, n_descriptors)

    monkeypatch.setattr(device, "_execute", refuse_one)
    outcome = bench.start(
        mediating(bench, "message"),
        held=True,
    )
    while device.refuse.get(Command.DMA_MAP) is None:
        assert bench.step()
    while len(bench.to_device) > 0 and bench.to_device[0][1] == 0:
        bench.step()
    device.refuse.clear()
    bench.settle()
    assert isinstance(outcome[0][1], DeviceRefused)
    assert {a: has_fd for a, (_, has_fd) in device.mapped.items()} == {0x10000: True, 0x20000: True}
    assert bench.custody.state is CustodyState.PASSTHROUGH
    assert bench.link.service.bitmap is None
    assert not bench.link.relay.holding
    mediate(bench, "none")
    for fd in fds:
        os.close(fd)


@given(
    st.sets(st.integers(0, 79), max_size=12),
    st.sampled_from([PAGE, 4 * PAGE, 1 << 20]),
    st.sampled_from([1 << 20, 64 + 8, 64 + 24]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i1_the_logging_tracker_reports_every_page_written(
    make_bench: Callable[..., Bench], pages: set[int], device_page: int, transfer: int
) -> None:
    """Any granularity of the device, any limit on a report, and regions that fill no word."""
    bench = make_bench(logging=True)
    bench.device.features.log_pages_of = device_page
    # With 1 MiB, three regions have a page of the device in common.
    rows = [(0x10000, 13), (0x40000, 3), (0x100000 - 2 * PAGE, 64)]
    fds = [bench.share(address, pages * PAGE) for address, pages in rows]
    object.__setattr__(bench.link.facts.capabilities, "max_data_xfer_size", transfer)
    mediated = mediate(bench, "logging")
    assert mediated.page_size == device_page
    addresses = [address + page * PAGE for address, pages in rows for page in range(pages)]
    for page in pages:
        bench.device.features.wrote(addresses[page] + 5, 1)
    expected = {
        other
        for other in range(80)
        for page in pages
        if addresses[other] // device_page == addresses[page] // device_page
    }
    assert take_dirty_pages(bench) == expected
    assert take_dirty_pages(bench) == set()
    restore(bench)
    assert bench.device.features.log_page == 0
    for fd in fds:
        os.close(fd)
    bench.close()


@pytest.mark.parametrize("device_page", [PAGE, 2 << 20])
@pytest.mark.parametrize("n_regions", [1, 3])
def test_accesses_are_served_while_the_log_of_a_large_guest_is_read(
    make_bench: Callable[..., Bench], n_regions: int, device_page: int
) -> None:
    """Between two reports, none of which is on more than 2 GiB; at rest nobody waits."""
    bench = make_bench(logging=True)
    bench.device.features.log_pages_of = device_page
    size = (1 << 40) // n_regions // (2 << 20) * (2 << 20)
    for number in range(n_regions):
        os.close(bench.share((2 << 40) * number, size))
    mediate(bench, "logging")
    bench.device.commands.clear()
    outcome = bench.start(jobs.dirty(bench.link))
    n_reads = 0
    while not outcome:
        assert len(bench.to_device) == 1, "one report at a time"
        if n_reads < 100:
            number = guest_read(bench, 0)
            bench.step()
            bench.step()
            assert bench.reply_to(number)[0] == 0
            n_reads += 1
        else:
            bench.step()
    assert outcome[0][0].complete
    n_reports = bench.device.commands.count(Command.DEVICE_FEATURE)
    assert n_reports >= 512
    bench.job(jobs.stop(bench.link, bench.custody, fence=False, resume=b""), held=True)
    bench.device.commands.clear()
    assert bench.job(jobs.dirty(bench.link)).complete
    assert bench.device.commands.count(Command.DEVICE_FEATURE) < n_reports // 4


def test_i1_dma_by_message_counts_while_the_device_logs(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(logging=True)
    fd = bench.share(0x10000, 4 * PAGE)
    mediate(bench, "logging")
    assert bench.dma(Command.DMA_WRITE, DmaAccess(0x12000, 1, b"x").pack())[0] == 0
    bench.device.features.wrote(0x13000, 1)
    assert take_dirty_pages(bench) == {2, 3}
    os.close(fd)


def test_a_device_that_logs_for_a_gateway_that_was_killed_starts_again(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(logging=True)
    fd = bench.share(0x10000, PAGE)
    bench.device.features.log_page = PAGE
    bench.device.features.wrote(0x10000, 1)
    mediate(bench, "logging")
    assert take_dirty_pages(bench) == set()
    os.close(fd)


def test_a_report_that_is_refused_is_said_to_be_incomplete(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(logging=True)
    fd = bench.share(0x10000, PAGE)
    mediate(bench, "logging")
    bench.device.features.refuse = {FeatureIndex.DMA_LOGGING_REPORT}
    assert bench.job(jobs.dirty(bench.link)).complete is False
    os.close(fd)


def test_what_cannot_be_tracked_is_refused_before_anything_is_done(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    with pytest.raises(Unsupported):
        mediate(bench, "message")
    fd = bench.share(0x10000, PAGE)
    with pytest.raises(Unsupported):
        mediate(bench, "logging")
    odd = bench.share(0x20000, PAGE + 512)
    with pytest.raises(LayoutUnaligned):
        mediate(bench, "message")
    mediate(bench, "none")
    with pytest.raises(WrongState):
        bench.job(jobs.dirty(bench.link))
    for number in (fd, odd):
        os.close(number)
