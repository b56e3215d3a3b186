"""What is foretold of a migration: what a look sees, the range that it gives, and the course."""

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ferry.findings import Level
from ferry.migration import forecast as module
from ferry.migration.forecast import DeviceShare, Look, Written, forecast, look_at
from ferry.migration.precopy import limits_of
from ferry.migration.send_options import Options
from sync.convergence import FIXED_COST_MS, Reason, Verdict
from sync.memory import PAGE_BYTES, GuestMemory, MemoryRegion
from sync.registers.interface import StateLeft
from transport.kernels.digests import digest_pages

MIB = 1 << 20
OPTIONS = Options(to="ipc:///x", qmp="q", lanes=1)
IDLE = Look(1 << 18, 8192, 4096, (Written(0.5, 0), Written(2.0, 0)), 0.5, 300.0)


def busy(first: int, last: int) -> Look:
    return replace(IDLE, written=(Written(0.5, first), Written(2.0, last)))


def test_an_idle_guest_moves_in_the_time_that_its_memory_takes() -> None:
    """1 GiB, half of it zero: 512 MiB, or half of that where it is compressed."""
    told = forecast(IDLE, 100 * MIB, OPTIONS, scans=False)
    assert told.best.duration_s == pytest.approx(2.56, abs=0.5)
    assert told.worst.duration_s == pytest.approx(512 / 60, abs=1.0)
    assert told.best.converges and told.worst.converges
    assert 50 <= told.best.downtime_ms <= told.worst.downtime_ms <= 300
    finding = told.finding()
    assert finding.level is Level.OK and "50% of its memory is zero" in finding.text
    alike = forecast(IDLE, 100 * MIB, replace(OPTIONS, codec="none"), scans=False)
    assert alike.best.duration_s == pytest.approx(5.12, abs=0.5)


def test_a_guest_that_writes_faster_than_the_link_does_not_converge() -> None:
    """64 MiB are written in half a second, and other 192 in the next one and a half."""
    look = busy(512, 2048)
    for options, verdict, says in (
        (OPTIONS, Verdict.SWITCH, "takes longer then"),
        (replace(OPTIONS, on_stall="abort"), Verdict.GIVE_UP, "would be given up"),
    ):
        told = forecast(look, 50 * MIB, options, scans=False)
        assert told.worst.reason is Reason.STALL and told.worst.verdict is verdict
        finding = told.finding()
        assert finding.level is Level.NOTE and says in finding.text
        assert "--downtime-limit" in finding.advice
    assert told.values()["converges"] == [told.best.converges, False]


def test_what_is_written_again_and_again_is_counted_once() -> None:
    """A working set of 16 MiB: as much in two seconds as in half of one."""
    look = busy(128, 128)
    least, most = (look.dirty_pages(60.0, most=each) for each in (False, True))
    assert 3000 < least < 4096 < most < 5500
    assert forecast(look, 100 * MIB, replace(OPTIONS, downtime_limit=1000), scans=False)
    with_limit = forecast(look, 100 * MIB, replace(OPTIONS, downtime_limit=800), scans=False)
    assert with_limit.worst.converges


def test_a_device_that_is_scanned_costs_a_reading_of_all_memory() -> None:
    logged, scanned = (forecast(IDLE, 100 * MIB, OPTIONS, scans=each) for each in (False, True))
    read_ms = IDLE.digest_ns_per_page * IDLE.n_pages / 1e6
    assert scanned.best.downtime_ms - logged.best.downtime_ms == pytest.approx(2 * read_ms, rel=0.1)


@given(st.integers(0, 8192), st.integers(0, 8192), st.floats(0.01, 1000), st.floats(0.01, 1000))
def test_the_least_is_not_more_than_the_most_and_time_brings_no_less(
    first: int, more: int, one_s: float, other_s: float
) -> None:
    look = busy(first, min(8192, first + more))
    short, long = sorted((one_s, other_s))
    for most in (False, True):
        pages = look.dirty_pages(short, most=most)
        assert 0 <= pages <= look.n_pages
        assert pages <= look.dirty_pages(long, most=most) * (1 + 1e-9)
    if look.written[0].differing == look.written[1].differing:
        assert look.dirty_pages(2.0, most=False) <= look.dirty_pages(2.0, most=True)


def test_the_range_holds_what_is_true_nearly_always() -> None:
    random = np.random.default_rng(1)
    for part in (0.0005, 0.01, 0.3, 0.99):
        within = 0
        for _ in range(1000):
            hits = int(random.binomial(8192, part))
            least, most = (module._bound(hits, 8192, 1 << 18, most=each) for each in (False, True))
            within += least <= part <= most
        assert within > 900
    assert module._bound(3, 10, 10, most=True) == module._bound(3, 10, 10, most=False) == 0.3


def test_a_look_sees_what_is_written_whoever_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 pages 16 are random; 10 are written within the first interval, 20 within both. Pages
    that nobody has touched stay untouched."""
    n_pages = 64
    fd = os.memfd_create("ram")
    os.ftruncate(fd, n_pages * PAGE_BYTES)
    os.pwrite(fd, os.urandom(16 * PAGE_BYTES), 0)
    digest, looks = digest_pages, 0

    def digests(*arguments: Any) -> Any:
        nonlocal looks
        found = digest(*arguments)
        looks += 1
        if looks <= 2:
            for page in range(10 * looks):
                os.pwrite(fd, os.urandom(8), page * PAGE_BYTES)
        return found

    monkeypatch.setattr(module, "digest_pages", digests)
    monkeypatch.setattr(module, "LOOKS_S", (0.01, 0.02))
    with GuestMemory.map([MemoryRegion(0, n_pages * PAGE_BYTES, 0, True, fd=fd)]) as memory:
        look = trio.run(look_at, memory)
    assert (look.n_pages, look.sampled, look.zero) == (64, 64, 48)
    assert [each.differing for each in look.written] == [10, 20]
    assert look.compressed == 1.0
    assert look.dirty_pages(look.written[1].interval_s, most=True) == pytest.approx(20)
    assert 0 < look.digest_ns_per_page < math.inf
    assert os.fstat(fd).st_blocks * 512 < n_pages * PAGE_BYTES
    os.close(fd)


def test_memory_that_has_to_be_pinned_is_part_of_the_downtime() -> None:
    plain, pinned = (
        forecast(IDLE, 100 * MIB, OPTIONS, scans=False, devices=[DeviceShare(showing_ms=ms)])
        for ms in (0.0, 70.0)
    )
    for before, after in ((plain.best, pinned.best), (plain.worst, pinned.worst)):
        assert after.downtime_ms == pytest.approx(before.downtime_ms + 70)
    assert limits_of(OPTIONS, 70.0).fixed_cost_ms == limits_of(OPTIONS).fixed_cost_ms + 70


def test_state_of_a_devices_own_is_part_of_the_downtime_and_told_of_each() -> None:
    """256 MiB at 9 ns a byte, or by a link of 100 MiB/s, which is slower."""
    large, silent = DeviceShare(StateLeft(256 * MIB, 9.0)), DeviceShare(None)
    told = forecast(IDLE, 100 * MIB, OPTIONS, scans=False, devices=[DeviceShare(), large, silent])
    assert told.device_values(0) == {"state_bytes": 0, "downtime_ms": [0, 0]}
    assert told.device_values(1)["downtime_ms"] == pytest.approx([2560, 2560 / 0.6])
    assert told.device_values(2) == {"state_bytes": None, "downtime_ms": None}
    values = told.values()
    for devices, memory, whole in zip(
        (2560, 2560 / 0.6), values["memory_downtime_ms"], values["downtime_ms"], strict=True
    ):
        assert whole == pytest.approx(devices + memory + FIXED_COST_MS)
    assert not told.best.converges
    text = told.finding().text
    assert "2560 to 4267 ms of it are device 1's own" in text
    assert "without the state of device 2" in text and "device 0" not in text
    fast = forecast(IDLE, 10_000 * MIB, OPTIONS, scans=False, devices=[large])
    assert fast.device_values(0)["downtime_ms"] == pytest.approx([2415.9, 2415.9], abs=0.1)


def test_a_downtime_above_the_limit_is_noted_though_the_rounds_converge() -> None:
    """The rounds are judged by zeros, too, which go faster than what is sent last."""
    look = replace(IDLE, zero=8000, written=(Written(0.5, 130), Written(2.0, 190)))
    told = forecast(look, 100 * MIB, OPTIONS, scans=False)
    assert told.worst.converges and told.worst.downtime_ms > 300
    assert told.finding().level is Level.NOTE
    assert "may stand still for longer than the limit" in told.finding().text
