"""QEMU programs: is there one in which a guest with a vfio-user device can run?"""

from collections.abc import AsyncIterator
from pathlib import Path

import trio

from ferry.doctor.qemu_program import DEVICE, Qemu, find_qemu
from ferry.errors import QemuMissing
from ferry.findings import Finding, note, ok, problem

HOW_TO_GET_ONE = (
    "install QEMU 10.1 or later, or name one with --qemu (`python -m lab.qemu prepare` makes one "
    "in a cache folder, out of Debian packages)"
)


async def qemu_findings(program: str | None) -> AsyncIterator[Finding]:
    """A finding on the QEMU `program`, or on the one in $PATH."""
    yield await trio.to_thread.run_sync(_search if program is None else lambda: _named(program))


def _named(program: str) -> Finding:
    try:
        return _usable(find_qemu([Path(program)]))
    except QemuMissing as error:
        return problem("QEMU", str(error), HOW_TO_GET_ONE)


def _search() -> Finding:
    """A finding on the QEMU in $PATH. That there is none is only a note: the VMM may have been
    started from elsewhere."""
    try:
        return _usable(find_qemu())
    except QemuMissing as error:
        return note("QEMU", str(error), HOW_TO_GET_ONE)


def _usable(qemu: Qemu) -> Finding:
    return ok("QEMU", f"{qemu.version_text} with {DEVICE}: {qemu.program}")
