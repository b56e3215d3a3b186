"""The target's VMM as its guest arrives: its stream, and what it knows of its devices by itself.

Owns what is done once however often it is asked for: by the source, early, while it compares the
memories, and in any case before this side is ready.
"""

import trio

from ferry.migration.late_memory import LateMemory
from sync.vmm.driver import Vmm
from sync.vmm.pci import PciPlatform


class IncomingVmm:
    """A VMM that waits for its guest. `platform` gives access to what it keeps of the devices and
    does not migrate; None where it keeps nothing (QEMU only)."""

    def __init__(self, vmm: Vmm, platform: PciPlatform | None, late: LateMemory) -> None:
        self._vmm = vmm
        self._platform = platform
        self._late = late
        self._lock = trio.Lock()
        self._loaded = False
        self._completed = False
        self.guest_was = "running"
        """The run state in which its migration has found the guest; known when the source asks."""
        self.platform_state = b""
        """What the source found of the VMM's own when its guest had stopped."""

    async def wait_loaded(self) -> None:
        """Waits until the VMM has loaded its stream: from then on it changes nothing until it is
        resumed. Raises `MigrationFailed` and what the VMM does."""
        async with self._lock:
            if not self._loaded:
                await self._vmm.wait_loaded()
                await self._late.arrive()
                self._loaded = True

    async def complete_platform(self) -> None:
        """Gives the VMM `platform_state`, once. Raises `VmmError`."""
        async with self._lock:
            if not self._completed and self._platform is not None:
                await self._platform.restore(self.platform_state)
            self._completed = True
