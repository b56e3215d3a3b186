"""Options that make no sense are refused before anything starts."""

from typing import Any

import pytest

from lab.guest.errors import GuestOptionsError
from lab.guest.layout import Layout
from lab.guest.options import GuestOptions

PATHS: dict[str, Any] = {"device_path": "device", "qmp_path": "qmp"}


def test_they_survive_json() -> None:
    options = GuestOptions(**PATHS, irq="intx", iops=12.5, content=("/etc",))
    assert GuestOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize(
    "wrong",
    [
        {"low_bytes": 4096},
        {"low_bytes": (4 << 20) + 1},
        {"high_bytes": 1 << 50},
        {"queue_size": 100},
        {"queue_size": 2048},
        {"queue_depth": 0},
        {"queue_depth": 43},
        {"block_bytes": 512},
        {"block_bytes": 128 << 10},
        {"block_bytes": 6 << 10},
        {"blocks": 3},
        {"read_share": 1.5},
        {"read_share": float("nan")},
        {"iops": -1},
        {"irq": "msi"},
        {"content": ()},
        {"read_area_bytes": 4096},
        {"write_area_bytes": 4096},
        {"cache_area_bytes": 1},
        {"cpu_pages_per_s": "many"},
        {"low_bytes": 33554432.0},
        {"incoming": 1},
        {"device_path": 7},
        {"content": [1]},
        {"content": (1,)},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(GuestOptionsError):
        GuestOptions(**{**PATHS, **wrong})


@pytest.mark.parametrize(
    "text", ["", "[]", "1", '{"device_path": 1}', '{"nonsense": 1}', "[" * 9999]
)
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(GuestOptionsError):
        GuestOptions.from_json(text)


@pytest.mark.parametrize("wrong", [{"low_bytes": 4 << 20}, {"high_bytes": 4 << 20}])
def test_a_workload_that_does_not_fit_into_ram_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(GuestOptionsError, match="too small"):
        Layout.of(GuestOptions(**{**PATHS, **wrong}))


def test_the_areas_do_not_overlap() -> None:
    options = GuestOptions(**PATHS)
    layout = Layout.of(options)
    starts = [
        layout.counters,
        layout.queue,
        layout.requests,
        layout.write_area,
        layout.cache_area,
    ]
    assert starts == sorted(starts)
    assert layout.requests - layout.queue >= 16 * options.queue_size + 6 + 8 * options.queue_size
    assert layout.cache_area - layout.write_area == options.write_area_bytes
    assert layout.cache_area + options.cache_area_bytes <= options.low_bytes
    assert layout.read_table - layout.block_table >= 16 * options.blocks
    assert layout.read_area + options.read_area_bytes <= (4 << 30) + options.high_bytes
