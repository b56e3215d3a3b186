"""What the devices of a source say of a migration before it begins."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ferry.migration.source_devices import SourceDevice, showing_ms


def device(pin_ns: float, *, fence: bool) -> SourceDevice:
    info, registers = SimpleNamespace(pin_ns_per_page=pin_ns), SimpleNamespace(fence=fence)
    return SourceDevice(0, "", cast(Any, None), cast(Any, info), cast(Any, registers), "scan")


def test_memory_that_is_pinned_is_counted_at_the_target_and_where_it_is_taken_away() -> None:
    """A process maps it at no cost; a function that is not fenced keeps it until it is let go."""
    process, queues, fenced = (
        device(0.0, fence=True),
        device(500.0, fence=False),
        device(500.0, fence=True),
    )
    assert showing_ms([process], 1 << 20) == 0.0
    assert showing_ms([queues], 1 << 20) == pytest.approx(524.288)
    assert showing_ms([fenced, queues], 1 << 20) == pytest.approx(3 * 524.288)
