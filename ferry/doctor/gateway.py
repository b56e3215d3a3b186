"""A gateway and its device: is it free for a migration, and which methods would move the device?

The gateway is asked as an observer, who may look at any time and holds nothing up. The methods are
chosen by the same functions as in `send`.
"""

import os
import secrets
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from ferry.findings import Finding, methods_text, note, ok, problem
from ferry.migration.devices import view_of
from ferry.progress import bytes_text
from sync.dirty.tracker import NoTracker, RequestedTracker, choose_method
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.info import GatewayInfo
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.records import Fate
from sync.gateway.errors import GatewayError
from sync.registers.choose import RequestedMethod, source_for
from sync.registers.errors import FeatureNotCarried, RegisterError
from sync.registers.find import Origin, find_profile
from sync.vfio_user.protocol import RegionFlags

ANSWER_S = 5.0
OFFERS = {
    "v2": "VFIO migration v2",
    "precopy": "pre-copy of its state",
    "logging": "DMA logging",
    "queues": "queues that can be followed",
    "reset": "reset",
}


@dataclass(frozen=True, slots=True)
class Wish:
    """The options of `send` for which the doctor predicts how a device would move."""

    registers: RequestedMethod
    dirty: RequestedTracker
    profiles: tuple[Origin, ...]


async def gateway_findings(path: str, wish: Wish) -> AsyncIterator[Finding]:
    """Findings on the gateway whose control socket is at `path`, its device and its VMM's
    memory."""
    name = f"gateway {path}"
    socket = _socket(name, Path(path))
    if socket is not None:
        yield socket
        if socket.level == "problem":
            return
    try:
        with trio.fail_after(ANSWER_S):
            async with await GatewayClient.connect(path) as gateway:
                for finding in await _findings(name, path, gateway, wish):
                    yield finding
    except trio.TooSlowError:
        yield problem(name, f"it has not answered for {ANSWER_S:g} s", "restart it with its VM")
    except GatewayError as error:
        yield problem(name, str(error))


def _socket(name: str, path: Path) -> Finding | None:
    """What is wrong with the control socket at `path` before anything is asked; None: nothing."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        advice = "start the gateway, or give the path of its --control"
        return problem(name, f"there is no socket ({error.strerror})", advice)
    if not stat.S_ISSOCK(mode):
        return problem(name, "this is no socket", "give the path of the gateway's --control")
    if not os.access(path, os.R_OK | os.W_OK):
        return problem(name, "it may not be opened by this user", "run as the gateway's user")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        text = f"its mode is {stat.S_IMODE(mode):04o}: others may take the guest's memory from it"
        return note(name, text, f"chmod 600 {path}")
    return None


async def _findings(name: str, path: str, gateway: GatewayClient, wish: Wish) -> list[Finding]:
    info = await gateway.status()
    found = [_state(name, info)]
    if info.last_recovery is not None:
        outcome = "went well" if info.last_recovery.ok else "failed"
        text = f"it had to bring its VMM back by itself, which {outcome}: "
        found.append(note(name, f"{text}{info.last_recovery.message}"))
    if replaced := _replaced(name, info):
        found.append(replaced)
    if not info.device_connected:
        found.append(problem(name, "it has no device", f"start the device at {info.device_path}"))
        return found
    found += _device(info, wish, gateway)
    if hidden := _hidden(info):
        found.append(hidden)
    if negotiated := await _negotiated(path, info, wish):
        found.append(negotiated)
    if info.vmm_connected:
        found.append(await _memory(name, gateway))
    else:
        advice = "start the VMM with the gateway's --listen path as its device's socket"
        found.append(problem(name, "no VMM is connected", advice))
    return found


def _state(name: str, info: GatewayInfo) -> Finding:
    if info.lease:
        advice = "wait for its end; only one at a time is possible"
        return problem(name, f"a migration runs with it as {info.lease} ({info.state})", advice)
    fate = info.sessions.get(info.session)
    if fate is Fate.MOVED:
        text = f"the guest that was here moved in session {info.session}; another may come"
        return ok(name, text)
    if info.state != "passthrough":
        advice = (
            f"run `vfio-ferry resolve --session {info.session}` on both hosts, the target first"
        )
        return problem(name, f"session {info.session} is in doubt here: {fate}", advice)
    if info.owner == "fenced":
        text = f"the VMM waited for session {info.session}, which is fenced"
        return problem(name, text, "restart the VMM before the next attempt")
    return ok(name, "free, its device in passthrough")


def _replaced(name: str, info: GatewayInfo) -> Finding | None:
    """The device is elsewhere than where another gateway of the same options would look for it."""
    if info.device_path == info.device_option:
        return None
    text = f"its device was replaced by the one at {info.device_path}; --device is still "
    advice = f"change --device to {info.device_path} before another gateway is started"
    return note(name, text + info.device_option, advice)


def _device(info: GatewayInfo, wish: Wish, gateway: GatewayClient) -> list[Finding]:
    """What the device offers, and what would be made of it."""
    view = view_of(info)
    name = f"device {view.ids}"
    offers = [text for field, text in OFFERS.items() if getattr(info.supports, field)]
    profile = find_profile(view, wish.profiles)
    text = f"class {view.class_code:06x}; it offers {', '.join(offers) or 'nothing'}; "
    text += f"profile {profile.name} {profile.version}" if profile else "no profile matches it"
    found = [ok(name, text)]
    try:
        registers = source_for(view, gateway, wish.profiles, wish.registers).method
        dirty = choose_method(wish.dirty, info.supports)
    except (RegisterError, NoTracker) as error:
        return [*found, problem(name, str(error))]
    return [*found, ok(name, f"would move with {methods_text(registers, dirty)}")]


def _hidden(info: GatewayInfo) -> Finding | None:
    """The regions that the device offers for mmap and the gateway does not pass on."""
    mapped = [index for index, region in info.regions.items() if region.flags & RegionFlags.MMAP]
    if not mapped:
        return None
    return note(
        f"device {view_of(info).ids}",
        f"it offers region {', '.join(map(str, mapped))} for mmap, which is hidden from the VMM: a "
        "mapped register cannot be migrated. A device that polls such registers is up to 20 times "
        "slower than with doorbells that are messages",
        "turn mapping off at the device (SPDK's NVMe target: disable_mappable_bar0)",
    )


async def _negotiated(path: str, info: GatewayInfo, wish: Wish) -> Finding | None:
    """What the guest's driver has negotiated and the device's profile does not carry.

    Only who has the gateway's lease may read registers, so it is taken for a moment, if it is free.
    """
    view = view_of(info)
    profile = find_profile(view, wish.profiles)
    if profile is None or not profile.carried or info.lease or info.state != "passthrough":
        return None
    session = secrets.token_hex(16)
    try:
        async with await GatewayClient.connect(
            path, role=ClientRole.SOURCE, session=session
        ) as gateway:
            await source_for(view, gateway, wish.profiles, wish.registers).offer()
    except FeatureNotCarried as error:
        return problem(f"device {view.ids}", str(error))
    except (RegisterError, GatewayError):
        return None  # told by others, or a migration has just begun
    return None


async def _memory(name: str, gateway: GatewayClient) -> Finding:
    regions = await gateway.memory()
    for region in regions:
        os.close(region.fd)
    if not regions:
        advice = "give the VMM memory with share=on (QEMU: memory-backend-memfd or -file)"
        return problem(name, "the VMM shares no memory with it", advice)
    size = bytes_text(sum(region.length for region in regions))
    return ok(name, f"{size} of guest memory in {len(regions)} regions")
