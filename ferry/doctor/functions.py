"""PCI functions of this host that a gateway could own, and how they would move."""

from collections.abc import Iterator
from pathlib import Path

from ferry.findings import Finding, methods_text, note, ok
from sync.queues.choose import find_class, load_classes
from sync.vfio.errors import VfioError
from sync.vfio.sysfs import SYSFS, VFIO_DRIVER, PciFunction, host_functions


def function_findings(sysfs: Path = SYSFS) -> Iterator[Finding]:
    """One finding for each function whose queues are known (`sync.queues`)."""
    classes = load_classes()
    for function in host_functions(sysfs):
        try:
            found = find_class(function.view(), classes)
        except (OSError, ValueError):
            # It was taken out meanwhile.
            continue
        if found is not None:
            yield _judge(function, found.name, "queues" if found.tracks_writes else "scan")


def _judge(function: PciFunction, name: str, dirty: str) -> Finding:
    check = f"function {function.address}"
    text = f"{name}; would move with {methods_text('v2', dirty)}, made of its queues"
    try:
        function.require_viable()
    except VfioError as error:
        return note(check, f"{text}; cannot be served: {error}")
    if function.driver != VFIO_DRIVER:
        advice = f"gateway --device vfio:{function.address} --bind takes it from the host"
        return note(check, f"{text}; {function.driver or 'no driver'} has it", advice)
    return ok(check, f"{text}; {VFIO_DRIVER} has it")
