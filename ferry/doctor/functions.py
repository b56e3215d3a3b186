"""PCI functions of this host that a gateway could own, and how they would move."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ferry.findings import Finding, methods_text, note, ok
from sync.queues.choose import find_class, load_classes
from sync.registers.choose import state_elsewhere
from sync.registers.find import Origin, find_profile
from sync.vfio.errors import VfioError
from sync.vfio.sysfs import SYSFS, VFIO_DRIVER, PciFunction, host_functions


def function_findings(profiles: Sequence[Origin] = (), sysfs: Path = SYSFS) -> Iterator[Finding]:
    """One finding for each function whose queues or registers are known, and for each that VFIO
    has."""
    classes = load_classes()
    for function in host_functions(sysfs):
        try:
            view = function.view()
        except (OSError, ValueError):
            # It was taken out meanwhile.
            continue
        found = find_class(view, classes)
        profile = find_profile(view, profiles)
        if found is not None:
            dirty = "queues" if found.tracks_writes else "scan"
            yield _judge(function, f"{found.name}; would move with {methods_text('v2', dirty)}")
        elif profile is not None:
            methods = methods_text("replay", "scan")
            yield _judge(function, f"profile {profile.name}; would move with {methods}")
        elif function.is_vfio:
            what = state_elsewhere(view) or "no queues and no profile are known of it"
            yield note(
                f"function {function.address}",
                f"device {view.ids}: {what}; {function.driver} has it",
                "it can be served, but moves only if that driver offers VFIO migration v2, which "
                "its gateway asks for: doctor --gateway",
            )


def _judge(function: PciFunction, text: str) -> Finding:
    check = f"function {function.address}"
    try:
        function.require_viable()
    except VfioError as error:
        return note(check, f"{text}; cannot be served: {error}")
    if not function.is_vfio:
        advice = f"gateway --device vfio:{function.address} --bind takes it from the host"
        return note(check, f"{text}; {function.driver or 'no driver'} has it", advice)
    if function.driver != VFIO_DRIVER:
        text += f", unless {function.driver} offers VFIO migration v2"
    return ok(check, f"{text}; {function.driver} has it")
