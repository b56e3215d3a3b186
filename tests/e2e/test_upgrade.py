"""Gateways are upgraded while their guest's checksummed load runs, and go on as what they were."""

from pathlib import Path

import pytest

from tests.e2e.test_device_restart import LOAD, events, restart, start_one, wait_back
from tests.e2e.two_hosts import Method, assert_sound, migrate, new_bed, small_setup


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.full)])
def test_i9_a_gateway_is_upgraded_under_load_and_its_device_still_comes_back(
    tmp_path: Path, times: int
) -> None:
    """What the first process has seen of the driver's writes is what the last one knows."""
    with new_bed(tmp_path, small_setup(Method(), *LOAD)) as bed:
        host = start_one(bed)
        for _ in range(times):
            bed.upgrade_gateway(host)
            bed.wait_operations(host, 300)
        restart(bed, host)
        back = wait_back(host, 1)
        assert back["work_known"] and not back["refused"], back
        assert_sound(bed, host)
        pauses = [event["pause_ms"] for event in events(host, "took-over")]
        assert len(pauses) == times
        print("the guest waited for (ms):", pauses)
        assert not events(host, "vmm-lost")


@pytest.mark.full
def test_a_guest_moves_away_behind_a_gateway_that_was_upgraded(tmp_path: Path) -> None:
    with new_bed(tmp_path, small_setup(Method("v2", "logging"))) as bed:
        a, b = bed.hosts["a"], bed.hosts["b"]
        bed.start_host(a, incoming=False)
        bed.start_host(b, incoming=True)
        bed.wait_operations(a, 300)
        bed.upgrade_gateway(a)
        migrate(bed, a, b, Method("v2", "logging"))
        assert_sound(bed, b)
