"""Whether gateways, guest memory and QMP socket belong to one VM (I11), before anything is touched.

Owned here: what is looked at, and what it proves. What ties a device of a VMM to its gateway is the
socket that the VMM was given, and what ties memory to a VMM is that it holds the same files.
Process ids say less, since a manager may have made a socket for a VMM.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ferry.errors import Mismatch
from ferry.migration.devices import memory_of
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.info import VmmConnection
from sync.gateway.errors import NoDevice
from sync.peer_process import pid_namespace
from sync.vmm.devices import VmmDevice, list_devices
from sync.vmm.driver import Vmm

File = tuple[int, int]
"""Device and inode number of a file."""


@dataclass(frozen=True, slots=True)
class VmmFacts:
    """What is known of the VMM behind a QMP socket. Nothing is 0 or empty."""

    pid: int = 0
    """Of the process that listens there."""
    program: File | None = None
    """What that process runs."""
    files: frozenset[File] = frozenset()
    """What it has open."""
    devices: tuple[VmmDevice, ...] = ()
    sockets: tuple[File | None, ...] = ()
    """The file of each device's socket, as far as it is found."""


@dataclass(frozen=True, slots=True)
class GatewayFacts:
    """What is known of a gateway and of the VMM that has connected to it."""

    control: str
    """The path of its control socket."""
    listens_at: str = ""
    socket: File | None = None
    pid: int = 0
    """Of the VMM, if it is of our process namespace."""
    program: File | None = None
    memory: frozenset[File] = frozenset()
    """The files of the guest's memory."""


async def prove_one_vm(
    paths: Sequence[str], gateways: Sequence[GatewayClient], vmm: Vmm, *, vouched: bool
) -> tuple[str, ...]:
    """The place of each gateway's device in `vmm`; empty where the VMM does not tell.

    `paths` are the control sockets of `gateways`. Raises `Mismatch` where something is of another
    VM, or where nothing proves that it is not and nobody vouches for it, and what gateways and VMM
    do.
    """
    facts = [
        await _gateway_facts(path, gateway) for path, gateway in zip(paths, gateways, strict=True)
    ]
    devices = judge(await _vmm_facts(vmm), facts, vouched=vouched)
    return tuple(device.place if device else "" for device in devices)


def compare_places(here: Sequence[str], there: Sequence[str]) -> None:
    """Raises `Mismatch` unless each of our devices is where the source has the one of its number.

    One alone may be in a place that a VMM does not tell; several could be taken for each other.
    """
    for number, (ours, theirs) in enumerate(zip(here, there, strict=True)):
        if ours and theirs and ours != theirs:
            raise Mismatch(
                f"device {number} is at {ours!r} in the VMM here, at {theirs!r} in the source's: "
                "give --gateway in the same order on both hosts, and start both VMMs with the same "
                "devices in the same places"
            )
        if len(here) > 1 and not (ours and theirs):
            raise Mismatch(
                f"where device {number} is in the VMM is not told: several devices cannot be told "
                "apart without"
            )


def judge(
    vmm: VmmFacts, gateways: Sequence[GatewayFacts], *, vouched: bool
) -> tuple[VmmDevice | None, ...]:
    """The device of `vmm` that each of `gateways` serves; None where it cannot be told.

    Raises `Mismatch` as `prove_one_vm` does.
    """
    found = [_device_at(vmm, gateway) for gateway in gateways]
    for gateway, device in zip(gateways, found, strict=True):
        _check_one_vm(vmm, gateway, device, vouched=vouched)
    if len(gateways) == 1 and len(vmm.devices) == 1:
        return vmm.devices
    if len(gateways) > 1 and None in found:
        unknown = gateways[found.index(None)]
        raise Mismatch(
            f"which of the VMM's devices the gateway at {unknown.control} serves cannot be told: "
            f"it listens at {unknown.listens_at}, the devices have {_sockets_text(vmm)}"
        )
    return tuple(found)


def _device_at(vmm: VmmFacts, gateway: GatewayFacts) -> VmmDevice | None:
    for device, file in zip(vmm.devices, vmm.sockets, strict=True):
        same = device.socket == gateway.listens_at if file is None else file == gateway.socket
        if device.socket and same:
            return device
    return None


def _check_one_vm(
    vmm: VmmFacts, gateway: GatewayFacts, device: VmmDevice | None, *, vouched: bool
) -> None:
    if vmm.pid and gateway.pid == vmm.pid:
        return
    if gateway.memory and gateway.memory <= vmm.files:
        return
    both_known = vmm.pid and gateway.pid and vmm.program is not None
    if both_known and vmm.program == gateway.program:
        raise Mismatch(
            f"the gateway at {gateway.control} serves the VMM of process {gateway.pid}, --qmp is "
            f"that of process {vmm.pid}: name the gateways and the QMP socket of one VM"
        )
    if device is not None:
        return
    if any(each.socket for each in vmm.devices):
        raise Mismatch(
            f"the gateway at {gateway.control} is not of the VMM behind --qmp: it listens at "
            f"{gateway.listens_at}, the devices there have {_sockets_text(vmm)}; name the gateways "
            "and the QMP socket of one VM"
        )
    if not vouched:
        raise Mismatch(
            f"nothing proves that the gateway at {gateway.control} and --qmp are of one VM: run "
            "this as the VMM's user and in its namespaces, or vouch for it with --vouch-one-vm"
        )


def _sockets_text(vmm: VmmFacts) -> str:
    return ", ".join(device.socket or "an unknown socket" for device in vmm.devices) or "none"


async def _gateway_facts(path: str, gateway: GatewayClient) -> GatewayFacts:
    theirs: VmmConnection = (await gateway.status()).vmm
    pid = theirs.pid if theirs.pid_namespace == pid_namespace() else 0
    memory: frozenset[File] = frozenset()
    with suppress(NoDevice):
        async with memory_of(gateway) as regions:
            memory = frozenset(_file_of(os.fstat(region.fd)) for region in regions)
    return GatewayFacts(
        control=path,
        listens_at=theirs.path,
        socket=(theirs.device, theirs.inode) if theirs.inode else None,
        pid=pid,
        program=_find(Path(f"/proc/{pid}/exe")) if pid else None,
        memory=memory,
    )


async def _vmm_facts(vmm: Vmm) -> VmmFacts:
    pid = vmm.client.peer_pid
    process = Path(f"/proc/{pid}")
    devices = await list_devices(vmm)
    return VmmFacts(
        pid=pid,
        program=_find(process / "exe") if pid else None,
        files=_open_files(process) if pid else frozenset(),
        devices=devices,
        # A relative path is of the folder in which the VMM was started.
        sockets=tuple(
            _find(process / "cwd" / each.socket) if each.socket else None for each in devices
        ),
    )


def _open_files(process: Path) -> frozenset[File]:
    try:
        paths = list((process / "fd").iterdir())
    except OSError:
        return frozenset()
    found = (_find(path) for path in paths)
    return frozenset(file for file in found if file is not None)


def _find(path: Path) -> File | None:
    try:
        return _file_of(path.stat())
    except OSError:
        return None


def _file_of(status: os.stat_result) -> File:
    return status.st_dev, status.st_ino
