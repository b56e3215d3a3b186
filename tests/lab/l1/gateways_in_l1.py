"""Runs inside of the emulated host: gateways in pairs, each of which owns a function. A guest moves
from one NVMe controller to the other, after moves that ended before; `edu` tries to reach memory
that is not its own; a NIC in the middle of its traffic is carried over. Prints one JSON document.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from lab.vfio_user.client import Client
from sync.vfio.sysfs import PciFunction, host_functions
from tests.lab.l1 import e1000
from tests.lab.l1.edu import IDENTITY, try_to_reach
from tests.sync.vfio.moving import abort_everywhere

DEADLINE_S = 120.0


class Host:
    """A gateway in a process of its own, and its VMM."""

    def __init__(self, folder: Path, function: PciFunction) -> None:
        folder.mkdir()
        self.folder = folder
        self.function = function
        arguments = ("--listen", folder / "vmm", "--control", folder / "control", "--json")
        device = ("--device", f"vfio:{function.address}", "--bind")
        command = [sys.executable, "-m", "ferry.cli", "gateway", *map(str, (*arguments, *device))]
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        self.end = -1

    def connect(self) -> None:
        end = time.monotonic() + DEADLINE_S
        while not (self.folder / "vmm").exists():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        self.vmm = Client(self.folder / "vmm", timeout_s=DEADLINE_S)

    def close(self) -> None:
        self.vmm.close()
        self.process.terminate()
        self.end = self.process.wait(DEADLINE_S)


@contextmanager
def pair(functions: list[PciFunction], result: dict[str, object]) -> Iterator[list[Host]]:
    """Two hosts; what became of their functions goes into `result`."""
    before = [function.driver for function in functions]
    with tempfile.TemporaryDirectory() as name:
        hosts = [
            Host(Path(name) / letter, function)
            for letter, function in zip("ab", functions, strict=True)
        ]
        try:
            for host in hosts:
                host.connect()
            result["drivers"] = [before, [function.driver for function in functions]]
            yield hosts
            for host in hosts:
                host.close()
        except BaseException as error:
            for host in hosts:
                error.add_note((host.folder / "log").read_text())
            raise
        result["drivers"] += [[function.driver for function in functions]]  # type: ignore[operator]
        result["ends"] = [host.end for host in hosts]
        result["logs"] = [(host.folder / "log").read_text() for host in hosts]


def main() -> None:
    nvme: dict[str, object] = {}
    edu: dict[str, object] = {}
    nic: dict[str, object] = {}
    functions = host_functions()
    with pair([each for each in functions if each.class_code == 0x010802], nvme) as hosts:
        nvme["stood still ms"] = round(abort_everywhere(*hosts), 1)
    found = [each for each in functions if (each.view().vendor, each.view().device) == IDENTITY]
    with pair(found, edu) as (source, target):
        edu["reached"] = trio.run(try_to_reach, source, target)
    peer, *found = (
        each for each in functions if (each.view().vendor, each.view().device) == e1000.IDENTITY
    )
    with pair(found, nic) as (source, target):
        nic["carried"] = trio.run(e1000.carry_over, source, target, peer)
    print(json.dumps({"nvme": nvme, "edu": edu, "e1000": nic}), flush=True)


if __name__ == "__main__":
    main()
