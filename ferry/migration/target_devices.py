"""The target's devices: its lease on each gateway, whether they fit the source's, and the fence.

Owns what is compared before anything is touched, and what makes sure that the guest never starts
here. When a device stands by, is owned or started is `ferry.migration.target`'s.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from ferry.errors import Mismatch
from ferry.host_memory import check_room
from ferry.migration.devices import check_gateway, memory_of, offer_of, view_of
from ferry.migration.late_memory import LateMemory, stand_ins
from ferry.migration.memory_layout import MemoryLayout, late_files, same_pages
from ferry.migration.messages import DeviceOffer, MigrationHello
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.info import GatewayInfo
from sync.gateway.engine.custody import ClientRole
from sync.gateway.errors import (
    DeviceLost,
    DeviceRefused,
    DeviceTimeout,
    GatewayLost,
    VmmLost,
    WrongState,
)
from sync.memory import GuestMemory
from sync.registers.choose import target_for
from sync.registers.errors import IdentityMismatch, MethodMismatch, NoMethod, ProfileMismatch
from sync.registers.find import load_profiles
from sync.registers.interface import TargetRegisters


@dataclass(frozen=True)
class Lease:
    """A gateway that takes orders from this process alone, for `session`."""

    gateway: GatewayClient
    session: str


@dataclass(frozen=True)
class TargetDevice:
    """One device that waits for the guest."""

    gateway: GatewayClient
    registers: TargetRegisters


async def attach_devices(
    paths: Sequence[str],
    profiles: Sequence[str],
    hello: MigrationHello,
    held: AsyncExitStack,
    leases: list[Lease],
) -> tuple[TargetDevice, ...]:
    """Takes the lease of the gateway at each of `paths`, which `held` gives back, and finds out
    whether its device and memory are those of `hello`. A lease is added to `leases` once it is
    taken, whatever becomes of the rest.

    Raises `Mismatch`, `LocalError`, and what gateways and profiles do.
    """
    if len(hello.devices) != len(paths):
        raise Mismatch(
            f"the source has {len(hello.devices)} devices, this side {len(paths)} gateways: "
            "give --gateway once for each device, in the same order on both hosts"
        )
    layout = MemoryLayout.from_rows(hello.files, hello.layout)
    known = load_profiles([Path(item) for item in profiles])
    devices = []
    for number, (path, theirs) in enumerate(zip(paths, hello.devices, strict=True)):
        gateway = await held.enter_async_context(
            await GatewayClient.connect(path, role=ClientRole.TARGET, session=hello.session)
        )
        leases.append(Lease(gateway, hello.session))
        info = await check_gateway(path, gateway)
        _compare(number, info, theirs)
        try:
            registers = target_for(bytes.fromhex(theirs.registers), view_of(info), gateway, known)
            await registers.check()
        except (IdentityMismatch, MethodMismatch, NoMethod, ProfileMismatch) as error:
            raise Mismatch(f"device {number}: {error}") from error
        async with memory_of(gateway) as regions:
            late_files(layout, regions)
            check_room(regions)
        devices.append(TargetDevice(gateway, registers))
    return tuple(devices)


def _compare(number: int, info: GatewayInfo, theirs: DeviceOffer) -> None:
    ours = offer_of(info, b"")
    for what in ("identity", "regions", "irqs"):
        if getattr(ours, what) != getattr(theirs, what):
            raise Mismatch(
                f"device {number} has another {what} here: {getattr(ours, what)}, "
                f"the source's {getattr(theirs, what)}; use the same device with the same "
                "options on both hosts"
            )


async def map_memory(
    gateway: GatewayClient, hello: MigrationHello, held: AsyncExitStack
) -> tuple[GuestMemory, LateMemory]:
    """The pages that the source sends, in this VMM's memory, writable until `held` is closed, and
    what of it the VMM maps only later.

    Raises `Mismatch` if the memory is no longer the one that was checked.
    """
    layout = MemoryLayout.from_rows(hello.files, hello.layout)
    async with memory_of(gateway) as regions:
        files = stand_ins(layout, regions)
        pages = same_pages(layout, regions, files)
        memory = held.enter_context(
            GuestMemory.map(pages, writable=True, passing=set(files.values()))
        )
        late = LateMemory(gateway, layout, memory, files)
        held.callback(late.close)
        return memory, late


async def fence(leases: Sequence[Lease], *, start_asked: bool) -> tuple[bool, Exception | None]:
    """Makes sure that no message whatsoever can start the guest here from this session, unless the
    first gateway was asked to start it (`start_asked`) and has it on record that it may have run:
    then nothing is done. If that one is gone by then, nobody knows: `GatewayLost` is raised.

    Returns whether it is fenced, and what became of a gateway or device that is gone, if one is.
    Raises what the gateways do.
    """
    lost: Exception | None = None
    for number, lease in enumerate(leases):
        try:
            try:
                await lease.gateway.fence(lease.session)
            except WrongState:
                # Started; or, if not by us, the name of an earlier session, which is over.
                if number == 0 and start_asked:
                    return False, lost
                continue
            with suppress(WrongState):  # there was no standby
                await lease.gateway.abandon()
        except GatewayLost as error:
            if number == 0 and start_asked:
                raise
            # A gateway that is started anew fences what had not begun to run.
            lost = error
        except (DeviceLost, DeviceTimeout, DeviceRefused) as error:
            # It is on record that no guest comes; with the lease the gateway abandons the rest.
            lost = error
        except VmmLost:
            continue
    return True, lost
