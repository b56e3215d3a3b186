"""What the parts of `sync` may not know of each other."""

import ast
from pathlib import Path

import pytest

import sync

ROOT = Path(next(iter(sync.__path__)))
FORBIDDEN = {
    ".": ("transport", "ferry", "lab", "perf"),
    "registers": ("sync.gateway", "sync.handover", "sync.vmm", "sync.dirty"),
    "dirty": ("sync.gateway", "sync.handover", "sync.vmm", "sync.registers"),
    "vmm": ("sync.gateway", "sync.handover", "sync.dirty", "sync.registers"),
    "vfio_user": ("sync.gateway", "sync.handover", "sync.vmm", "sync.dirty", "sync.registers"),
    "gateway": ("sync.handover", "sync.dirty"),
    "handover": ("sync.gateway", "sync.vmm", "sync.dirty", "sync.registers"),
}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it and for whatever purpose."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_no_part_knows_what_is_not_its_business(part: str) -> None:
    files = sorted((ROOT / part).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            assert not f"{name}.".startswith(tuple(f"{each}." for each in FORBIDDEN[part])), (
                f"{path.relative_to(ROOT)} imports {name}"
            )
