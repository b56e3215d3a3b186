"""Which QEMU a program is, and whether it can be used. Starts it; changes nothing."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ferry.errors import QemuMissing

MINIMUM_VERSION = (10, 1, 0)
"""The first QEMU with a vfio-user client."""
DEVICE = "vfio-user-pci"
QEMU_PROGRAM = "qemu-system-x86_64"
PROBE_DEADLINE_S = 60.0
"""QEMU lists its devices in 0.1 s; a machine that swaps takes longer."""

_VERSION = re.compile(r"\bversion (\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")
_DEVICE = re.compile(rf'^name "{re.escape(DEVICE)}"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Qemu:
    """A usable `qemu-system-x86_64`: `program` takes QEMU's own arguments."""

    program: Path
    version: tuple[int, int, int]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def parse_version(text: str) -> tuple[int, int, int] | None:
    """The version in what `qemu-system-x86_64 --version` prints, or None."""
    match = _VERSION.search(text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def has_device(device_help: str) -> bool:
    """Whether the output of `-device help` lists vfio-user-pci."""
    return _DEVICE.search(device_help) is not None


def probe(program: Path) -> Qemu:
    """What QEMU `program` is. Raises `QemuMissing` saying why it cannot be used."""
    version = parse_version(_output(program, "--version"))
    if version is None:
        raise QemuMissing(f"{program} does not say its version; is it QEMU?")
    qemu = Qemu(program, version)
    if version < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION[:2]))
        raise QemuMissing(f"{program} is QEMU {qemu.version_text}; {needed} or later is needed")
    if not has_device(_output(program, "-nodefaults", "-device", "help")):
        raise QemuMissing(f"{program} (QEMU {qemu.version_text}) was built without {DEVICE}")
    return qemu


def _output(program: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_DEADLINE_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QemuMissing(f"{program} cannot be run: {error}") from error
    if done.returncode:
        raise QemuMissing(f"{program} {arguments[-1]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def find_qemu(candidates: Sequence[Path] | None = None) -> Qemu:
    """The first usable QEMU of `candidates`, by default the one in $PATH.

    Raises `QemuMissing` with the reason for each of them.
    """
    if candidates is None:
        found = shutil.which(QEMU_PROGRAM)
        candidates = [Path(found)] if found else []
    reasons = []
    for program in candidates:
        try:
            return probe(program)
        except QemuMissing as error:
            reasons.append(str(error))
    raise QemuMissing("; ".join(reasons) or f"there is no {QEMU_PROGRAM} in $PATH")
