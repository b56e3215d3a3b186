"""A running VMM, by QMP: whether it can be migrated as it is, and what of it is ours to move.

Only queries are sent. A QMP socket serves one client at a time, so the examination is over within
seconds, and a socket that somebody else has is told of instead of waited for.
"""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ferry.doctor.qemu_program import MINIMUM_VERSION, parse_version
from ferry.findings import Finding, Level, note, ok, problem
from sync.vmm.driver import Vmm, blocked_reasons
from sync.vmm.errors import VmmBusy, VmmError, VmmNotReady, VmmRefused
from sync.vmm.identity import identify
from sync.vmm.pci import DRIVER, find_devices, way_to
from sync.vmm.qtest import obstacle
from sync.vmm.states import UNDER_WAY, migration_status_of
from sync.vmm.uncarried import what_is_not_carried

CONNECT_S = 2.0
PART = {"running": "the source", "inmigrate": "the target"}
"""Run states in which a VMM can take part in a migration, and as what."""
NEEDED = ("events", "pause-before-switchover")
UNPLUGGING = (
    "do not take it out of the running guest (`device_del`): QEMU aborts, and the guest with it"
)
UNWANTED = ("multifd", "mapped-ram", "x-ignore-shared", "postcopy-ram", "x-colo")
"""Capabilities with which the VMM's stream is another than the one that is carried, or leaves
memory out."""


async def vmm_findings(path: str, n_gateways: int) -> AsyncIterator[Finding]:
    """Findings on the VMM whose QMP socket is at `path`. `n_gateways`: how many gateways were named
    beside it; 0 if that is not the question."""
    socket = _socket(path)
    if socket is not None:
        yield socket
        return
    try:
        async with await Vmm.connect(path, deadline_s=CONNECT_S) as vmm:
            async for finding in _findings(vmm, path, n_gateways):
                yield finding
    except VmmBusy:
        yield problem(
            "QMP",
            f"{path} is busy: another client has it, and a QMP socket serves one at a time",
            "end the other client (a `send` or `receive`, a management tool), or give the VMM a "
            "second QMP socket for it",
        )
    except VmmError as error:
        yield problem("VMM", str(error))


def _socket(path: str) -> Finding | None:
    """What is wrong with the QMP socket at `path` before anything is asked; None: nothing."""
    if not Path(path).exists():
        return problem(
            "QMP", f"there is nothing at {path}", "start the VMM with a QMP socket there"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        return problem("QMP", f"{path} may not be opened by this user", "run as the VMM's user")
    return None


async def _findings(vmm: Vmm, path: str, n_gateways: int) -> AsyncIterator[Finding]:
    identity = await identify(vmm)
    version = parse_version(f"version {identity.version}")
    if version is not None and version < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION[:2]))
        yield problem("VMM", str(identity), f"QEMU {needed} or later is needed")
    else:
        yield ok("VMM", str(identity))
    yield await _state(vmm)
    yield await _capabilities(vmm)
    yield await _migration(vmm)
    yield await _stream(vmm)
    if version is not None:
        yield await _memory(vmm)
        for thing in await what_is_not_carried(vmm):
            advice = "this cannot be migrated: start the guest without"
            yield problem("machine", f"the VMM has {thing}", advice)
        async for finding in _devices(vmm, path, n_gateways):
            yield finding


async def _state(vmm: Vmm) -> Finding:
    state = await vmm.run_state()
    if state in PART:
        return ok("guest", f"{state}: this VMM can be {PART[state]} of a migration")
    if state == "postmigrate":
        advice = "do not continue it (`cont`): whose it is now, its gateway's record says"
        return note("guest", f"{state}: this VMM has sent its guest away", advice)
    if state == "paused" and migration_status_of(await vmm.execute("query-migrate")) == "completed":
        text = f"{state}: it has loaded a guest that was moved here"
        advice = "do not continue it by hand (`cont`): `vfio-ferry resolve` says whose the guest is"
        return problem("guest", text, advice)
    advice = "a source has to run (`cont`); a target is started with -S -incoming defer"
    return problem("guest", f"it is {state}", advice)


async def _capabilities(vmm: Vmm) -> Finding:
    rows = await vmm.execute("query-migrate-capabilities")
    states = {row["capability"]: row["state"] for row in rows}
    if missing := [name for name in NEEDED if name not in states]:
        return problem("capabilities", f"the VMM has no {' and no '.join(missing)}")
    if on := [name for name in UNWANTED if states.get(name)]:
        advice = "turn them off (`migrate-set-capabilities`): one plain stream is carried"
        return problem("capabilities", f"{', '.join(on)} on", advice)
    return ok("capabilities", f"it has {' and '.join(NEEDED)}")


async def _stream(vmm: Vmm) -> Finding:
    """How `send` carries this VMM's own stream, as far as that shows before."""
    if reason := await vmm.why_closed():
        return ok("stream", f"carried as it is, and all RAM in it: {reason}")
    return ok("stream", "opened, if it is QEMU's: all of the guest's memory takes the lanes")


async def _migration(vmm: Vmm) -> Finding:
    migration = await vmm.execute("query-migrate")
    status = migration_status_of(migration)
    if status in UNDER_WAY:
        return problem("migration", f"one is under way ({status})", "wait for its end")
    if reasons := blocked_reasons(migration):
        return problem("migration", f"blocked: {'; '.join(reasons)}", "remove what blocks it")
    return ok("migration", "nothing blocks it")


async def _memory(vmm: Vmm) -> Finding:
    backends = await vmm.execute("query-memdev")
    shared = [backend for backend in backends if backend.get("share")]
    names = ", ".join(_name(backend) for backend in shared or backends)
    if not shared:
        advice = "use -object memory-backend-memfd,id=ram,size=...,share=on and "
        advice += "-machine memory-backend=ram"
        return problem("RAM", f"not shared with devices ({names})", advice)
    if cut := await _cut_backends(vmm):
        text = f"{', '.join(cut)} begins in the middle of its file (offset=): QEMU tells devices "
        text += "places in the file as if it began at 0"
        return problem("RAM", text, "give the guest's memory a file of its own, without offset=")
    if len(shared) < len(backends):
        others = ", ".join(_name(backend) for backend in backends if not backend.get("share"))
        return note("RAM", f"shared: {names}; not shared: {others}", "add share=on to all of it")
    return ok("RAM", f"shared: {names}")


async def _cut_backends(vmm: Vmm) -> list[str]:
    """The memory backends that are a part of a file (QEMU 11.1: DMA_MAP has wrong offsets)."""
    found = []
    for item in await vmm.execute("qom-list", {"path": "/objects"}):
        if str(item.get("type")) != "child<memory-backend-file>":
            continue
        with contextlib.suppress(VmmRefused):
            path = f"/objects/{item['name']}"
            if await vmm.execute("qom-get", {"path": path, "property": "offset"}):
                found.append(str(item["name"]))
    return found


def _name(backend: dict[str, Any]) -> str:
    return f"{backend.get('id', 'without id')} of {int(backend['size']) >> 20} MiB"


async def _devices(vmm: Vmm, path: str, n_gateways: int) -> AsyncIterator[Finding]:
    devices = await find_devices(vmm)
    if not devices:
        yield problem(
            "devices",
            f"the guest has no {DRIVER}",
            f"add -device with driver {DRIVER} and the gateway's --listen path as its socket",
        )
        return
    for device in devices:
        name = device.rpartition("/")[2]
        yield Finding(Level.OK, "device", f"{name}: {await _place(vmm, device)}", UNPLUGGING)
    if n_gateways and n_gateways != len(devices):
        yield problem(
            "devices",
            f"{len(devices)} {DRIVER} and {n_gateways} --gateway",
            "name the gateway of each device, in the same order on both hosts",
        )
    if reason := await obstacle(vmm, path):
        yield problem("qtest", reason, "without it the PCI state that QEMU keeps cannot be moved")
    else:
        yield ok("qtest", "to be had: `send` and `receive` move QEMU's PCI state by it")


async def _place(vmm: Vmm, device: str) -> str:
    try:
        way = await way_to(vmm, device)
    except (VmmNotReady, VmmRefused) as error:
        return f"its place is not told: {error}"
    slots = [f"{value >> 3:02x}.{value & 7}" for value in way.devfns]
    root = f" of root bus {way.root_bus:02x}" if way.root_bus else " of the root bus"
    if len(slots) == 1:
        return f"at {slots[0]}{root}"
    return f"at {slots[0]} behind the bridge at {' behind that at '.join(slots[1:])}{root}"
