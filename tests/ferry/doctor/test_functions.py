"""What the doctor says of functions of the host."""

from pathlib import Path

from ferry.doctor.functions import function_findings
from ferry.findings import Level
from sync.registers.find import load_profiles
from tests.sync.vfio.fake_kernel import FakeSysfs

PROFILES = load_profiles()
NET, DISK = 0x020000, 0x010000


def test_functions_whose_queues_are_known_are_told_with_what_stands_in_their_way(
    tmp_path: Path,
) -> None:
    tree = FakeSysfs(tmp_path)
    tree.add("0000:01:00.0", driver="vfio-pci", group="1")
    tree.add("0000:02:00.0", driver="nvme", group="2")
    tree.add("0000:03:00.0", driver="vfio-pci", group="3")
    tree.add("0000:03:00.1", driver="e1000", group="3", class_code=NET)
    tree.add("0000:04:00.0", driver="nvme", group=None)
    found = list(function_findings(PROFILES, tmp_path))
    assert [finding.level for finding in found] == [Level.OK, Level.NOTE, Level.NOTE, Level.NOTE]
    assert "registers by v2" in found[0].text
    assert "--bind" in found[1].advice
    assert "0000:03:00.1 (e1000)" in found[2].text
    assert "IOMMU" in found[3].text


def test_functions_whose_registers_are_known_move_by_replay(tmp_path: Path) -> None:
    tree = FakeSysfs(tmp_path)
    tree.add(
        "0000:01:00.0", driver="vfio-pci", group="1", ids=(0x8086, 0x100E), class_code=0x020000
    )
    tree.add("0000:02:00.0", driver="e1000", group="2", ids=(0x8086, 0x100E), class_code=NET)
    tree.add(
        "0000:03:00.0", driver="vfio-pci", group="3", ids=(0x1AF4, 0x1042), class_code=0x010000
    )
    known, taken, disk = function_findings(PROFILES, tmp_path)
    assert known.level is Level.OK and "registers by replay" in known.text
    assert "scan" in known.text and "e1000" in taken.text
    assert "virtio" in disk.text and "registers by v2" in disk.text and "scan" in disk.text


def test_what_vfio_has_and_nobody_knows_is_told(tmp_path: Path) -> None:
    tree = FakeSysfs(tmp_path)
    tree.add(
        "0000:01:00.0", driver="mlx5_vfio_pci", group="1", ids=(0x15B3, 0x101E), class_code=0x020000
    )
    tree.add(
        "0000:02:00.0", driver="vfio-pci", group="2", ids=(0x1AF4, 0x1041), class_code=0x020000
    )
    tree.add("0000:03:00.0", driver="ahci", group="3", ids=(0x8086, 0x2922), class_code=DISK)
    own, net = function_findings(PROFILES, tmp_path)
    assert "no queues" in own.text
    assert "mlx5_vfio_pci has it" in own.text
    assert "commands set its filters" in net.text and "VFIO migration v2" in net.advice


def test_a_host_without_pci_has_none(tmp_path: Path) -> None:
    assert not list(function_findings(PROFILES, tmp_path))
