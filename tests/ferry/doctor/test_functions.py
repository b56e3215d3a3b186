"""What the doctor says of functions of the host."""

from pathlib import Path

from ferry.doctor.functions import function_findings
from ferry.findings import Level
from tests.sync.vfio.fake_kernel import FakeSysfs


def test_functions_whose_queues_are_known_are_told_with_what_stands_in_their_way(
    tmp_path: Path,
) -> None:
    tree = FakeSysfs(tmp_path)
    tree.add("0000:01:00.0", driver="vfio-pci", group="1")
    tree.add("0000:02:00.0", driver="nvme", group="2")
    tree.add("0000:03:00.0", driver="vfio-pci", group="3")
    tree.add("0000:03:00.1", driver="e1000", group="3", class_code=0x020000)
    tree.add("0000:04:00.0", driver="nvme", group=None)
    found = list(function_findings(tmp_path))
    assert [finding.level for finding in found] == [Level.OK, Level.NOTE, Level.NOTE, Level.NOTE]
    assert "registers by v2" in found[0].text
    assert "--bind" in found[1].advice
    assert "0000:03:00.1 (e1000)" in found[2].text
    assert "IOMMU" in found[3].text


def test_a_host_without_pci_has_none(tmp_path: Path) -> None:
    assert not list(function_findings(tmp_path))
