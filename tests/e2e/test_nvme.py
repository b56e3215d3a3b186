"""Our guest's NVMe driver, two I/O queues, moves between controllers that offer no migration."""

from pathlib import Path

import pytest

from lab.testbed import Setup
from tests.e2e.two_hosts import GUEST, Method, assert_sound, migrate, new_bed, start_both

BY_QUEUES = Method("v2", "queues")


@pytest.mark.parametrize(
    "depth",
    [2, *(pytest.param(depth, marks=pytest.mark.full) for depth in (1, 7, 16))],
)
def test_a_guest_with_queues_moves_there_and_back(tmp_path: Path, depth: int) -> None:
    setup = Setup(
        disk="nvme",
        gateway=("--queues",),
        guest=(*GUEST, "--disk", "nvme", "--queue-depth", str(depth)),
        image_bytes=16 << 20,
    )
    with new_bed(tmp_path, setup) as bed:
        a, b = start_both(bed)
        migrate(bed, a, b, BY_QUEUES, "--verify", "all")
        assert_sound(bed, b)
        assert a.guest is not None
        a.guest.kill()
        bed.start_guest(a, incoming=True)
        migrate(bed, b, a, BY_QUEUES)
        guest = assert_sound(bed, a)
        assert guest["migrations"] == 2
        assert guest["device_resets"] == guest["device_reconnects"] == 0
