"""How the downtime is split: without gaps, by owner, and whatever a peer tells of its part."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.migration.downtime import VMM_PHASES, Downtime
from ferry.migration.report import Report

TOLD: st.SearchStrategy[Any] = st.one_of(
    st.floats(), st.integers(), st.none(), st.text(max_size=3), st.just([])
)
PARTS = st.dictionaries(st.sampled_from(["own", "PCI restore", *sorted(VMM_PHASES)]), TOLD)


@given(st.lists(st.tuples(st.sampled_from(["pause", "verify", "commit"]), PARTS), max_size=6))
def test_the_phases_make_up_the_whole(laps: list[tuple[str, dict[str, Any]]]) -> None:
    now = time.time()
    downtime = Downtime(now - 0.02, now - 0.01)
    for phase, parts in laps:
        downtime.lap(phase, parts)
    assert all(ms >= 0 for ms in downtime.phases_ms.values())
    assert sum(downtime.phases_ms.values()) == pytest.approx(downtime.total_ms)
    assert downtime.own_ms + downtime.vmm_ms == pytest.approx(downtime.total_ms)


def test_what_the_vmm_took_is_not_ours() -> None:
    now = time.time()
    downtime = Downtime(now - 3.0, now - 2.0)
    downtime.lap("final state", {"VMM transfer": 1500.0})
    assert downtime.phases_ms["VMM stop"] == pytest.approx(1000, abs=1)
    assert downtime.phases_ms["VMM transfer"] == 1500
    assert downtime.vmm_ms == pytest.approx(2500, abs=1)
    assert downtime.phases_ms["final state"] == pytest.approx(downtime.total_ms - 2500, abs=1)


@pytest.mark.parametrize(("stopped", "waiting"), [(9.0, 9.0), (0.0, 9.0), (0.0, -1.0)])
def test_clocks_that_do_not_fit_together_make_no_negative_phase(
    stopped: float, waiting: float
) -> None:
    now = time.time()
    downtime = Downtime(now + stopped, now + waiting)
    downtime.lap("pause")
    assert all(ms >= 0 for ms in downtime.phases_ms.values())
    assert downtime.total_ms >= 0


def test_the_report_tells_both_parts_by_phase() -> None:
    report = Report(
        session="5",
        downtime_ms={"VMM stop": 1.0, "pause": 2.0, "VMM transfer": 20.0, "verify": 3.0},
        downtime_total_ms=26.0,
        downtime_own_ms=5.0,
        downtime_vmm_ms=21.0,
        beside_vmm_ms={"pages": 7.0},
        verification={"checked_pages": 1, "scope": "all", "repaired_pages": 0},
    )
    lines = report.text().splitlines()
    assert "downtime 26.0 ms: the VMM's part 21.0 ms, vfio-ferry's 5.0 ms" in lines
    assert "  VMM:        VMM stop 1.0  VMM transfer 20.0" in lines
    assert "  vfio-ferry: pause 2.0  verify 3.0" in lines
    assert "  while the VMM worked, and not counted: pages 7.0" in lines
