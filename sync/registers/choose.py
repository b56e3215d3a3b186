"""Which method moves a device's registers.

Owns the choice on either side, and the offer by which the target can tell that both sides mean the
same. Not owned: where profiles come from (`find`).
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from sync.registers.capture import CaptureSource, CaptureTarget
from sync.registers.errors import (
    Difference,
    IdentityMismatch,
    MethodMismatch,
    NoMethod,
    PayloadError,
)
from sync.registers.find import Origin, find_profile
from sync.registers.interface import GatewayPort, SourceRegisters, TargetRegisters
from sync.registers.payload import PayloadKind, decode_json
from sync.registers.profile.layout import Layout
from sync.registers.profile.locate import DeviceView
from sync.registers.profile.model import Profile
from sync.registers.v2 import StreamSource, StreamTarget

MAX_CONSTANTS = 1 << 16

RequestedMethod = Literal["auto", "v2", "replay"]


def source_for(
    view: DeviceView,
    port: GatewayPort,
    origins: Iterable[Origin],
    method: RequestedMethod = "auto",
) -> SourceRegisters:
    """The source's half for a device.

    `auto` prefers the device's own state stream. Raises `NoMethod` if the device does not offer
    what is asked for, `ProfileMismatch` if its profile does not fit it.
    """
    if method in ("auto", "v2") and view.v2:
        return StreamSource(port, _describe(view, "v2"), precopy=view.precopy)
    if method == "v2":
        raise NoMethod(
            f"device {view.ids} does not offer VFIO migration v2: "
            "use method 'replay' with a profile, or 'auto'"
        )
    profile = find_profile(view, origins)
    if profile is None:
        raise _no_profile(view)
    layout = Layout(profile, view)
    return CaptureSource(layout, port, _describe(view, "replay", layout))


def target_for(
    offer: bytes, view: DeviceView, port: GatewayPort, origins: Iterable[Origin]
) -> TargetRegisters:
    """The target's half for the device that `offer` describes; `view` is the device here.

    Raises `IdentityMismatch`, `MethodMismatch`, `ProfileMismatch`, and `PayloadError` if the offer
    is malformed.
    """
    document = decode_json(PayloadKind.OFFER, offer)
    method = document.get("method")
    if method not in ("v2", "replay"):
        raise MethodMismatch(
            f"the source uses the register method {method!r}, which is not known here: "
            "run the same release on both hosts"
        )
    here = _describe(view, method)
    _compare(document, here, "device")
    _compare({"holds": {}} | document, here, "holds")
    if method == "v2":
        _compare(document, here, "structure")
        if not view.v2:
            raise MethodMismatch(
                f"the source's device {view.ids} offers VFIO migration v2, the target's does not: "
                "give it the same release, or ask the source for method 'replay'"
            )
        return StreamTarget(port)
    profile = find_profile(view, origins)
    if profile is None:
        raise _no_profile(view)
    _check_profile(document, profile)
    layout = Layout(profile, view)
    _compare(document, _describe(view, method, layout), "structure")
    return CaptureTarget(layout, port, _texts(document, "constants"))


def _describe(view: DeviceView, method: str, layout: Layout | None = None) -> dict[str, Any]:
    structure = {
        f"region {index}": f"{size:#x} bytes" for index, size in view.region_sizes.items() if size
    }
    document: dict[str, Any] = {
        "method": method,
        "device": {
            "vendor": f"{view.vendor:#06x}",
            "device": f"{view.device:#06x}",
            "subsystem vendor": f"{view.subsystem_vendor:#06x}",
            "subsystem": f"{view.subsystem:#06x}",
            "class": f"{view.class_code:#08x}",
        },
        "structure": structure,
        "holds": dict(view.holds),
    }
    if layout is not None:
        structure |= layout.structure()
        document["profile"] = {
            "name": layout.profile.name,
            "version": layout.profile.version,
            "digest": layout.profile.digest(),
        }
    return document


def _compare(offered: dict[str, Any], here: dict[str, Any], part: str) -> None:
    theirs, ours = _texts(offered, part), here[part]
    differences = [
        Difference(name, theirs.get(name, "nothing"), ours.get(name, "nothing"))
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise IdentityMismatch("the target's device is not like the source's", differences)


def _check_profile(offered: dict[str, Any], profile: Profile) -> None:
    theirs = _texts(offered, "profile")
    if theirs.get("digest") != profile.digest():
        raise MethodMismatch(
            f"the source uses profile {theirs.get('name')} {theirs.get('version')}, here it is "
            f"{profile.name} {profile.version}, and they differ: use the same file on both hosts"
        )


def _texts(document: dict[str, Any], part: str) -> dict[str, str]:
    found = document.get(part)
    if (
        not isinstance(found, dict)
        or len(found) > MAX_CONSTANTS
        or any(not isinstance(value, str) for value in found.values())
    ):
        raise PayloadError(f"the source's offer has no sound '{part}'")
    return found


class _Elsewhere(NamedTuple):
    """A kind of device whose state is known not to be in its registers, so that no profile can
    carry it. `None` matches anything."""

    vendor: int | None
    device: int | None
    class_code: int | None
    what: str

    def is_kind_of(self, view: DeviceView) -> bool:
        device = view.device
        if view.vendor == _VIRTIO:
            device = _TRANSITIONAL.get(device, device)
        mine = (self.vendor, self.device, self.class_code)
        return all(
            wanted in (None, found)
            for wanted, found in zip(mine, (view.vendor, device, view.class_code), strict=True)
        )


_VIRTIO = 0x1AF4
_TRANSITIONAL = {0x1000: 0x1041, 0x1002: 0x1045, 0x1003: 0x1043, 0x1004: 0x1048, 0x1009: 0x1049}
"""Device ids of virtio devices that drivers of old know, too, and their kind's other id."""
STATE_ELSEWHERE = (
    _Elsewhere(None, None, 0x010802, "NVMe: its queues are made by commands"),
    _Elsewhere(
        _VIRTIO, 0x1041, None, "virtio-net: commands set its filters, VLANs and queue pairs"
    ),
    _Elsewhere(_VIRTIO, 0x1043, None, "virtio-console: its ports are opened by messages"),
    _Elsewhere(_VIRTIO, 0x1045, None, "virtio-balloon: which pages it holds is in no register"),
    _Elsewhere(_VIRTIO, 0x1048, None, "virtio-scsi: task management goes through a queue"),
    _Elsewhere(_VIRTIO, 0x1049, None, "virtio-9p: open files are the device's"),
    _Elsewhere(_VIRTIO, 0x1050, None, "virtio-gpu: its resources are made by commands"),
    _Elsewhere(_VIRTIO, 0x1053, None, "virtio-vsock: its connections are the host's"),
    _Elsewhere(_VIRTIO, 0x1054, None, "virtio-crypto: its sessions are made by commands"),
    _Elsewhere(_VIRTIO, 0x1058, None, "virtio-mem: which blocks are plugged is in no register"),
    _Elsewhere(_VIRTIO, 0x1059, None, "virtio-sound: its streams are set up by commands"),
    _Elsewhere(_VIRTIO, 0x105A, None, "virtio-fs: open files are the device's"),
)
"""Known by the specifications of NVMe (sections 5.2 to 5.4, 2.0) and virtio (5, 1.2)."""


def state_elsewhere(view: DeviceView) -> str:
    """What a device is known to hold beside its registers, in words; '' if nothing is."""
    return next((kind.what for kind in STATE_ELSEWHERE if kind.is_kind_of(view)), "")


def _no_profile(view: DeviceView) -> NoMethod:
    who = (
        f"device {view.ids} (subsystem {view.subsystem_vendor:04x}:{view.subsystem:04x}, class "
        f"{view.class_code:06x}) offers no VFIO migration v2"
    )
    elsewhere = state_elsewhere(view)
    if elsewhere:
        return NoMethod(
            f"{who}, and what it holds is not all in its registers ({elsewhere}), so that no "
            "profile could carry it: use one that offers VFIO migration v2"
        )
    return NoMethod(
        f"{who}, and no profile describes its registers: write one (docs/profiles.md), and give "
        "its path with --profile on both hosts",
        draft=_DRAFT.format(vendor=view.vendor, device=view.device),
    )


_DRAFT = """\
# A draft, which is refused as it is. What goes here: python -m pydoc sync.registers.profile.toml
draft = true
format = 1
name = "my-device"
version = "1"
unlisted = "refuse"       # a write to a register that is not listed ends the migration

[[match]]
vendor = {vendor:#06x}
device = {device:#06x}

# [[register]]            # for each register: what it is, and what may be done with it
# name = "command"
# base = "pci:config"
# offset = 0x04
# size = 2
# class = "snapshot"
# hold_bits = 0x0004
#
# [[register]]
# name = "doorbell"
# base = "bar0"
# offset = 0x00
# size = 4
# class = "hold"
"""
