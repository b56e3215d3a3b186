"""The source's devices: its lease on each gateway, how registers and pages of each are moved, and
the way back to passthrough.

Owns what is asked and chosen before anything is touched. When a device is mediated, stopped or
released is `ferry.migration.source`'s.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import trio
from numpy.typing import NDArray

from ferry.errors import Mismatch, NotOwner
from ferry.migration.devices import check_gateway, memory_of, view_of
from ferry.migration.memory_layout import MemoryLayout
from ferry.migration.send_options import Options
from ferry.migration.undo import Undo, UndoStage
from sync.dirty.scan import ScanTracker
from sync.dirty.shared import LoggingTracker, MessageTracker, QueueTracker, SharedBitmapTracker
from sync.dirty.tracker import Bitmap, Method, Tracker, choose_method
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.info import GatewayInfo
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.records import Fate
from sync.gateway.errors import DeviceLost, GatewayError, GatewayLost
from sync.memory import GuestMemory
from sync.registers.choose import source_for
from sync.registers.find import load_profiles
from sync.registers.interface import SourceRegisters, StateLeft
from transport.kernels.digests import scan_changed

ALIVE_S = 1.0
_SHARED: dict[Method, type[SharedBitmapTracker]] = {
    each.method: each for each in (LoggingTracker, QueueTracker, MessageTracker)
}


@dataclass(frozen=True)
class SourceDevice:
    """One device of the guest, with what was chosen for it; `number` counts them from 0."""

    number: int
    path: str
    gateway: GatewayClient
    info: GatewayInfo
    registers: SourceRegisters
    tracking: Method

    def tracker(self, memory: GuestMemory, seed: int) -> Tracker:
        """A tracker of the pages that the device writes; `seed` is the link's, for digests."""
        if self.tracking == "scan":

            def scan(pages: NDArray[np.uint8], seen: NDArray[np.uint64]) -> Bitmap:
                return scan_changed(pages, seen, seed)

            return ScanTracker(memory.array, scan)
        return _SHARED[self.tracking](self.gateway, memory.n_pages)

    async def restore(self, session: str) -> None:
        """Puts the device back to passthrough, from whatever state its gateway is in.

        Raises `DeviceLost` if its VMM is no longer there, and what the gateway raises.
        """
        info = await self.gateway.status()
        if not info.vmm_connected:
            raise DeviceLost(f"the device behind {self.path} is no longer connected to the VMM")
        if info.state == "released":
            await self.gateway.reclaim(session)
        if info.state in ("mediated", "stopped", "released"):
            try:
                await self.registers.rollback()
            finally:
                await self.gateway.passthrough()

    async def disarm_recovery(self) -> None:
        """Has the gateway leave the VMM alone from here on: the guest runs."""
        with contextlib.suppress(GatewayLost):
            await self.gateway.disarm_recovery()


async def attach_devices(
    options: Options, session: str, held: AsyncExitStack, undo: Undo
) -> tuple[SourceDevice, ...]:
    """Takes the lease of each gateway of `options`, which `held` gives back, and chooses how the
    device's registers and pages move.

    Raises `NotOwner`, `LocalError`, and what gateways, profiles and trackers do.
    """
    profiles = load_profiles([Path(item) for item in options.profile])
    devices: list[SourceDevice] = []
    for number, path in enumerate(options.gateway):
        gateway = await held.enter_async_context(
            await GatewayClient.connect(path, role=ClientRole.SOURCE, session=session)
        )
        info = gateway.info
        if info.state == "released":
            moved = info.sessions.get(info.session) is Fate.MOVED
            raise NotOwner(
                f"the guest behind {path} moved away in session {info.session}"
                if moved
                else f"the gateway at {path} has let go of its guest in session {info.session}: "
                f"whose it is now says `vfio-ferry resolve --session {info.session}`, on the "
                "target first"
            )
        info = await check_gateway(path, gateway)
        registers = source_for(view_of(info), gateway, profiles, options.registers)
        tracking = choose_method(options.dirty, info.supports)
        device = SourceDevice(number, path, gateway, info, registers, tracking)
        undo.add(UndoStage.DEVICES, partial(device.restore, session))
        undo.add(UndoStage.RECOVERY, device.disarm_recovery)
        devices.append(device)
    return tuple(devices)


def showing_ms(devices: Sequence[SourceDevice], n_pages: int) -> float:
    """How long devices like these take to be shown all of guest memory, and those that are fenced
    to be taken it: what is pinned for a function of the host costs time, and both is done while
    the guest stands still. To unpin a page takes no longer than to find and pin it."""
    ns = sum(each.info.pin_ns_per_page * (1 + each.registers.fence) for each in devices)
    return ns * n_pages / 1e6


async def state_left(devices: Sequence[SourceDevice]) -> tuple[StateLeft, list[int]]:
    """What the devices hold of their own, all together, and the numbers of those that do not tell.
    Raises what `SourceRegisters` does."""
    told = [await device.registers.state_left() for device in devices]
    known = [each for each in told if each is not None]
    length = sum(each.bytes for each in known)
    ns = sum(each.bytes * each.ns_per_byte for each in known)
    silent = [number for number, each in enumerate(told) if each is None]
    return StateLeft(length, ns / length if length else 0.0), silent


async def keep_alive(devices: Sequence[SourceDevice]) -> None:
    """Lets the gateways know that this process goes on, until one of them has something against
    it: whoever asks it for more hears of that."""
    with contextlib.suppress(GatewayError):
        while True:
            for device in devices:
                await device.gateway.status()
            await trio.sleep(ALIVE_S)


async def map_memory(
    devices: Sequence[SourceDevice], held: AsyncExitStack
) -> tuple[GuestMemory, MemoryLayout]:
    """The guest's memory, mapped until `held` is closed, and how it is laid out.

    Raises `Mismatch` if the gateways of `devices` do not all see the same memory.
    """
    first, *others = devices
    async with memory_of(first.gateway) as regions:
        memory = held.enter_context(GuestMemory.map(regions))
        layout = MemoryLayout.of(regions)
    for device in others:
        async with memory_of(device.gateway) as regions:
            if [(region.iova, region.length) for region in regions] != [*memory.layout]:
                raise Mismatch(
                    f"the gateway at {device.path} sees another guest memory than {first.path}: "
                    "all gateways have to belong to one VMM"
                )
    return memory, layout
