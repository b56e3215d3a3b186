"""A QEMU that is not as it has to be: each reason is found, by what QEMU itself says."""

from typing import Any

import pytest
import trio

from ferry.doctor import vmm
from ferry.findings import Finding, Level
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmRefused
from sync.vmm.pci import DRIVER

DEVICE = "/machine/peripheral/device4"
ANSWERS: dict[str, Any] = {
    "query-status": {"status": "running"},
    "query-migrate": {},
    "query-migrate-capabilities": [
        {"capability": name, "state": False} for name in (*vmm.NEEDED, *vmm.UNWANTED)
    ],
    "query-migrate-parameters": {"max-bandwidth": 134217728},
    "query-memdev": [{"id": "ram", "size": 256 << 20, "share": True}],
    "query-chardev": [],
    "qom-list-types": [{"name": "qtest"}],
    "/machine type": "pc-q35-11.1-machine",
    "/machine/peripheral": [{"name": "device4", "type": f"child<{DRIVER}>"}],
    "/machine/peripheral-anon": [],
    "/machine/unattached": [{"name": "device[0]", "type": "child<kvmvapic>"}],
    "/machine confidential-guest-support": "",
    "/objects": [],
    "/machine/q35 type": "q35-pcihost",
    f"{DEVICE} addr": 0x20,
    f"{DEVICE} parent_bus": "/machine/q35/pcie.0",
}


class Client:
    """Answers queries; whatever would change the VMM is refused."""

    events_seen = 0

    def __init__(self, major: int, answers: dict[str, Any]) -> None:
        self.version = {"qemu": {"major": major, "minor": 1, "micro": 3}, "package": ""}
        self._answers = ANSWERS | answers

    async def execute(self, command: str, arguments: Any = None, *, deadline_s: float) -> Any:
        key = command
        if command in ("qom-list", "qom-get"):
            key = " ".join(filter(None, (arguments["path"], arguments.get("property"))))
        if key not in self._answers:
            raise VmmRefused(command, "GenericError", f"{key} is not to be had")
        return self._answers[key]


def found(n_gateways: int = 1, major: int = 11, **answers: Any) -> list[Finding]:
    client: Any = Client(major, {key.replace("_", "-"): value for key, value in answers.items()})

    async def main() -> list[Finding]:
        return [f async for f in vmm._findings(Vmm(client), "/run/qmp", n_gateways)]

    return trio.run(main)


def test_a_qemu_as_it_should_be() -> None:
    findings = found()
    assert {finding.level for finding in findings} == {Level.OK}
    said = {finding.check: finding.text for finding in findings}
    assert said["VMM"] == "QEMU 11.1.3 (pc-q35-11.1)"
    assert said["RAM"] == "shared: ram of 256 MiB"
    assert said["device"] == "device4: at 04.0 of the root bus"
    assert "QEMU aborts" in "".join(finding.advice for finding in findings)


def test_what_cannot_be_carried_is_a_problem_by_name() -> None:
    answers: dict[str, Any] = {
        "/machine/unattached": [{"name": "device[7]", "type": "child<arm-smmuv3>"}],
        "/machine/peripheral_anon": [{"name": "device[0]", "type": "child<intel-iommu>"}],
        "/machine confidential_guest_support": "/objects/sev0",
        "/objects/sev0 type": "sev-snp-guest",
    }
    told = [each for each in found(**answers) if each.check == "machine"]
    assert {each.level for each in told} == {Level.PROBLEM}
    assert [each.text.partition(" has ")[2] for each in told] == [
        "a vIOMMU (intel-iommu)",
        "a vIOMMU (arm-smmuv3)",
        "confidential memory (sev-snp-guest), which nobody but the guest can read",
    ]


def test_a_file_that_is_used_from_its_beginning_is_as_it_should_be() -> None:
    changed: dict[str, Any] = {
        "/objects": [{"name": "ram", "type": "child<memory-backend-file>"}],
        "/objects/ram offset": 0,
    }
    assert {finding.level for finding in found(**changed)} == {Level.OK}


ON = [{"capability": name, "state": name == "multifd"} for name in (*vmm.NEEDED, "multifd")]
PRIVATE = [{"id": "pc.ram", "size": 1 << 30, "share": False}]


@pytest.mark.parametrize(
    ("check", "text", "changed"),
    [
        ("VMM", "QEMU 9.1.3 (pc-q35-11.1)", {"major": 9}),
        ("guest", "it is paused", {"query_status": {"status": "paused"}}),
        ("capabilities", "multifd on", {"query_migrate_capabilities": ON}),
        (
            "capabilities",
            "the VMM has no events and no pause-before-switchover",
            {"query_migrate_capabilities": []},
        ),
        ("migration", "one is under way (active)", {"query_migrate": {"status": "active"}}),
        ("migration", "blocked: a device", {"query_migrate": {"blocked-reasons": ["a device"]}}),
        ("RAM", "not shared with devices (pc.ram of 1024 MiB)", {"query_memdev": PRIVATE}),
        (
            "RAM",
            "ram begins in the middle of its file (offset=): QEMU tells devices places in the file "
            "as if it began at 0",
            {
                "/objects": [{"name": "ram", "type": "child<memory-backend-file>"}],
                "/objects/ram offset": 1 << 20,
            },
        ),
        ("devices", "the guest has no vfio-user-pci", {"/machine/peripheral": []}),
        ("devices", "1 vfio-user-pci and 2 --gateway", {"n_gateways": 2}),
        ("qtest", "this QEMU was built without qtest", {"qom_list_types": []}),
        (
            "qtest",
            "QEMU has a qtest of somebody else's, and takes no second one",
            {"/objects": [{"name": "theirs", "type": "child<qtest>"}]},
        ),
    ],
)
def test_what_is_wrong_is_the_one_problem(check: str, text: str, changed: dict[str, Any]) -> None:
    (problem,) = [finding for finding in found(**changed) if finding.level is Level.PROBLEM]
    assert (problem.check, problem.text) == (check, text)


def test_a_guest_that_was_sent_away_is_no_problem_and_not_to_be_continued() -> None:
    (told,) = [
        finding
        for finding in found(query_status={"status": "postmigrate"})
        if finding.check == "guest"
    ]
    assert told.level is Level.NOTE
    assert "do not continue it" in told.advice


def test_i7_nobody_is_told_to_continue_a_guest_that_was_moved_here() -> None:
    """It may run at the source: only the records say whose it is."""
    loaded: dict[str, Any] = {
        "query_status": {"status": "paused"},
        "query_migrate": {"status": "completed"},
    }
    (told,) = [finding for finding in found(**loaded) if finding.check == "guest"]
    assert told.level is Level.PROBLEM
    assert "do not continue it" in told.advice
    assert "resolve" in told.advice
