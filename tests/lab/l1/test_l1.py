"""QEMU's own NVMe controllers behind the kernel's vfio-pci, in an emulated host."""

import json
import os
import sys
from pathlib import Path

import pytest

from lab.l1.host import build, run_in_l1
from lab.qemu.environment import Environment

HOUSE = Path(__file__).parents[3]

pytestmark = [pytest.mark.qemu]


def test_the_first_file_system_has_what_the_script_needs(environment: Environment) -> None:
    image = build(environment)
    for name in (b"init", b"bin/busybox", b"vfio-pci.ko", b"9pnet_virtio.ko", b"overlay.ko"):
        assert name in image


@pytest.mark.full
@pytest.mark.timeout(500)
def test_i4_a_guests_queues_go_on_at_another_controller_behind_vfio_pci(
    environment: Environment, short_path: Path
) -> None:
    program = (sys.executable, str(HOUSE / "tests/lab/l1/in_l1.py"))
    variables = {"PYTHONPATH": str(HOUSE), "PATH": os.environ["PATH"]}
    outcome = run_in_l1(environment, short_path, program, variables)
    assert outcome.status == 0, outcome.output + outcome.console
    result = json.loads(outcome.output.strip().splitlines()[-1])
    print(json.dumps(result, indent=1))
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
