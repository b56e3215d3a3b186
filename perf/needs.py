"""What a benchmark may need of the machine: each a function that says what is missing."""

import importlib.util
import os
import shutil
from collections.abc import Callable


def _root() -> str | None:
    return None if os.geteuid() == 0 else "root is needed"


def _netns() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} (package iproute2) not found" if missing else None


def _qemu() -> str | None:
    if shutil.which("qemu-system-x86_64") is None:
        return "qemu-system-x86_64 not found in PATH"
    return None


def _zstandard() -> str | None:
    if importlib.util.find_spec("zstandard") is None:
        return "the Python package zstandard is needed"
    return None


NEEDS: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "netns": _netns,
    "qemu": _qemu,
    "zstandard": _zstandard,
}


def missing(needs: tuple[str, ...]) -> str | None:
    """What is missing, in words; None if nothing is."""
    found = [reason for need in needs if (reason := NEEDS[need]())]
    return "; ".join(found) or None
