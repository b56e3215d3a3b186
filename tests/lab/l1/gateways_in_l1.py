"""Runs inside of the emulated host: two gateways, each of which owns one NVMe controller, and a
guest that moves from one to the other. Prints one JSON document."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.vfio_user.client import Client
from sync.vfio.sysfs import PciFunction, host_functions
from tests.sync.vfio.moving import move

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
        end = time.monotonic() + DEADLINE_S
        while not (folder / "vmm").exists():
            assert self.process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        self.vmm = Client(folder / "vmm", timeout_s=DEADLINE_S)

    def close(self) -> int:
        self.vmm.close()
        self.process.terminate()
        return self.process.wait(DEADLINE_S)


def main() -> None:
    functions = [each for each in host_functions() if each.class_code == 0x010802]
    with tempfile.TemporaryDirectory() as name:
        hosts = [
            Host(Path(name) / letter, function)
            for letter, function in zip("ab", functions, strict=True)
        ]
        drivers = [function.driver for function in functions]
        stood_ms = move(*hosts)
        ends = [host.close() for host in hosts]
        logs = [(host.folder / "log").read_text() for host in hosts]
    result = {
        "drivers": drivers,
        "drivers after": [function.driver for function in functions],
        "stood still ms": round(stood_ms, 1),
        "ends": ends,
        "logs": logs,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
