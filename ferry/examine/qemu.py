"""QEMU programs: is there one in which a guest with a vfio-user device can run?"""

from collections.abc import AsyncIterator
from pathlib import Path

import trio

from ferry.findings import Finding, note, ok, problem
from ferry.qemu.environment import cached, find_qemu
from ferry.qemu.errors import EnvironmentFailed, QemuMissing
from ferry.qemu.probe import DEVICE, Qemu

HOW_TO_GET_ONE = (
    "install QEMU 10.1 or later, or let `python -m ferry.qemu prepare` make one in a cache folder, "
    "out of Debian packages"
)


async def examine_qemu(program: str | None) -> AsyncIterator[Finding]:
    """Looks at `program`, or else in $PATH and then in the cache of `ferry.qemu`."""
    yield await trio.to_thread.run_sync(_search if program is None else lambda: _named(program))


def _named(program: str) -> Finding:
    try:
        return _usable(find_qemu([Path(program)]))
    except QemuMissing as error:
        return problem("QEMU", str(error), HOW_TO_GET_ONE)


def _search() -> Finding:
    """A VMM may run that was started from elsewhere, so that none is no problem yet."""
    try:
        return _usable(find_qemu())
    except QemuMissing as error:
        reason = str(error)
    try:
        environment = cached()
    except (EnvironmentFailed, QemuMissing) as error:
        return note("QEMU", f"{reason}; the cached one cannot be used: {error}", HOW_TO_GET_ONE)
    return (
        note("QEMU", reason, HOW_TO_GET_ONE) if environment is None else _usable(environment.qemu)
    )


def _usable(qemu: Qemu) -> Finding:
    return ok("QEMU", f"{qemu.version_text} with {DEVICE}: {qemu.program}")
