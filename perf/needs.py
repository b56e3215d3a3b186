"""What a benchmark may need of the machine: each a function that says what is missing."""

import functools
import importlib.util
import os
from collections.abc import Callable

from perf.errors import NeedMissing


def _root() -> str | None:
    return None if os.geteuid() == 0 else "root is needed"


@functools.cache
def _netns() -> str | None:
    from perf.links import missing

    return missing()


@functools.cache
def _qemu() -> str | None:
    from perf.baselines.qemu import program

    try:
        program()
    except NeedMissing as error:
        return str(error)
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
