"""What only our guest understands, over the QMP connection that drives its migration, too."""

from typing import Any

import trio

from sync.vmm.driver import Vmm
from sync.vmm.errors import QmpProtocolError, VmmNotReady

POLL_S = 0.05


async def guest_report(vmm: Vmm) -> dict[str, Any]:
    """`x-guest-report`: the members of `report.Counters`, and state, outstanding, verification."""
    report = await vmm.execute("x-guest-report")
    if not isinstance(report, dict):
        raise QmpProtocolError("x-guest-report returned no object")
    return report


async def verify_guest(vmm: Vmm) -> dict[str, Any]:
    """Has the guest read back and check all that it wrote; returns the report afterwards.

    The guest has to run. No deadline of its own: use `trio.fail_after`.
    `report["verification"]["state"]` is then `passed` or `failed`. Raises `VmmNotReady` if the
    guest gave up.
    """
    number = (await vmm.execute("x-guest-verify"))["number"]
    while True:
        report = await guest_report(vmm)
        if report["state"] == "internal-error":
            raise VmmNotReady(f"the guest cannot go on: {report['failure']}")
        verification = report["verification"]
        if verification["number"] > number or not verification["running"]:
            return report
        await trio.sleep(POLL_S)
