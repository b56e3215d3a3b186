"""QEMU's own NVMe controllers behind the kernel's vfio-pci, in an emulated host."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ferry.errors import Exit
from lab.l1 import demo
from lab.l1.host import build, run_in_l1
from lab.qemu.environment import Environment

DIRTY = {"nvme": "queues", "virtio": "scan"}
HOUSE = Path(__file__).parents[3]

pytestmark = [pytest.mark.qemu]


def test_the_first_file_system_has_what_the_script_needs(environment: Environment) -> None:
    image = build(environment)
    for name in (b"init", b"bin/busybox", b"vfio-pci.ko", b"9pnet_virtio.ko", b"overlay.ko"):
        assert name in image


def run_script(environment: Environment, folder: Path, name: str) -> dict[str, Any]:
    """The JSON document that a script of this folder prints in the emulated host."""
    program = (sys.executable, str(HOUSE / "tests/lab/l1" / name))
    variables = {"PYTHONPATH": str(HOUSE), "PATH": os.environ["PATH"]}
    outcome = run_in_l1(environment, folder, program, variables)
    assert outcome.status == 0, outcome.output + outcome.console
    result: dict[str, Any] = json.loads(outcome.output.strip().splitlines()[-1])
    print(json.dumps(result, indent=1))
    return result


@pytest.mark.full
@pytest.mark.timeout(500)
def test_i4_a_guests_queues_go_on_at_another_controller_behind_vfio_pci(
    environment: Environment, short_path: Path
) -> None:
    result = run_script(environment, short_path, "in_l1.py")
    assert len(result["functions"]) == 2
    assert result["drivers before"] == result["drivers after"] == ["nvme", "nvme"]
    assert not result["differences"]
    assert not result["refusals"]
    assert result["untouched"]
    assert result["fenced"]
    assert result["signals"] == [1]
    assert result["event requests left"] == 2
    assert result["vectors"]["MSIX"] == 65
    assert not result["migration v2"]


@pytest.mark.full
@pytest.mark.timeout(500)
def test_i4_gateways_that_own_functions_keep_them_from_memory_that_is_not_theirs(
    environment: Environment, short_path: Path
) -> None:
    """A guest's NVMe controller goes on at another one, after moves that ended in each phase."""
    result = run_script(environment, short_path, "gateways_in_l1.py")
    for kind, driver in (("nvme", "nvme"), ("edu", None), ("e1000", "e1000")):
        drivers = [[driver] * 2, ["vfio-pci"] * 2, [driver] * 2]
        assert result[kind]["drivers"] == drivers
        assert result[kind]["ends"] == [0, 0]
    assert result["edu"]["reached"] == {
        "source in passthrough": True,
        "target in standby": False,
        "source stopped": False,
        "target owns": False,
        "target started": True,
    }
    assert result["e1000"]["carried"] == {"divergences": {}}


@pytest.mark.full
@pytest.mark.timeout(1000)
def test_the_demonstration(environment: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest under load goes on at another function, and reads back all that it ever wrote."""
    code = demo.run(demo.Options(json=True))
    lines = capsys.readouterr().out.splitlines()
    reports = [json.loads(line) for line in lines if '"event": "report"' in line]
    assert code == Exit.OK, lines[-20:]
    methods = [[{"registers": "v2", "dirty": DIRTY[kind]}] for kind in demo.KINDS]
    assert [report["methods"] for report in reports] == methods
    for report in reports:
        assert report["sound"]
        assert report["guest"]["migrations"] == 1
