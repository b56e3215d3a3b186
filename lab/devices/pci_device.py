"""A PCI device over vfio-user, as far as it does not matter which: the base of every device here.

Owns regions, interrupts, the DMA map, the holds on DMA (no client, no bus mastering, stopped), DMA
logging and migration. Does not own what is behind the BARs: that is what a device adds.

All methods are called by the server's serving thread, but `step` and `failed`, which run in the
device's own threads.
"""

import errno
import struct
from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from lab.devices.config_space import ConfigSpace, PciStateError
from lab.devices.dirty_log import DirtyLog, DirtyLogError
from lab.devices.errors import StateStreamError
from lab.devices.interrupts import Interrupts, MsixTable
from lab.devices.memory import GuestMemory
from lab.devices.migration import Migration
from lab.devices.workers import Hold, Workers
from lab.vfio_user.server import Device, DmaPort
from sync.pci import Command
from sync.vfio_user.protocol import (
    PCI_NUM_IRQS,
    PCI_NUM_REGIONS,
    DataSize,
    DeviceFlags,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureFlags,
    FeatureIndex,
    IrqInfo,
    LoggingControl,
    LoggingReport,
    MigrationFlags,
    MigrationSupport,
    MigState,
    PciRegion,
    RegionFlags,
    RegionInfo,
    SetIrqs,
    VfioUserError,
)

MSIX_PBA_OFFSET = 0x800
"""Where the pending bits are in the MSI-X BAR; the table is at 0."""
MSIX_BAR_BYTES = 0x1000
STATE_BYTES = 64 << 10
"""What a device says that its state has; one with 64 full queues has some 40 KiB."""

Work = TypeVar("Work", bound=Hashable)


class PciDevice(Device, Generic[Work]):
    """A device with a configuration space, BARs and threads that do DMA for `Work`.

    `msix_bar`: the BAR of `MSIX_BAR_BYTES` for the MSI-X structures; None: no MSI-X.
    `n_workers`: threads, so also requests in flight.
    `v2`: offers VFIO migration (STOP_COPY and PRE_COPY).
    `logging_page_bytes`: the finest page its DMA logging resolves; None: it cannot log.
    """

    def __init__(
        self,
        config: ConfigSpace,
        interrupts: Interrupts,
        *,
        msix_bar: int | None,
        n_workers: int,
        v2: bool,
        logging_page_bytes: int | None,
    ) -> None:
        self.config = config
        self.interrupts = interrupts
        self.log = None if logging_page_bytes is None else DirtyLog(logging_page_bytes)
        self.memory = GuestMemory(self.log)
        self.migration = Migration(self) if v2 else None
        self._msix_bar = msix_bar
        self._msix_table = MsixTable(interrupts.n_vectors)
        self._sizes = {bar.index: bar.size for bar in config.bars} | {
            int(PciRegion.CONFIG): config.size
        }
        self._getters: dict[int, Callable[[bytes], bytes]] = {}
        self._setters: dict[int, Callable[[bytes], bytes]] = {}
        if v2:
            self._getters[FeatureIndex.MIGRATION] = self._get_migration
            self._getters[FeatureIndex.MIG_DEVICE_STATE] = self._get_state
            self._getters[FeatureIndex.MIG_DATA_SIZE] = lambda _: DataSize(STATE_BYTES).pack()
            self._setters[FeatureIndex.MIG_DEVICE_STATE] = self._set_state
        if self.log is not None:
            self._setters[FeatureIndex.DMA_LOGGING_START] = self._start_logging
            self._setters[FeatureIndex.DMA_LOGGING_STOP] = self._stop_logging
            self._getters[FeatureIndex.DMA_LOGGING_REPORT] = self._report
        self.workers: Workers[Work] = Workers(
            n_workers, self.step, self.failed, {Hold.NO_CLIENT, Hold.NO_BUS_MASTER}
        )

    # What a device adds.

    @abstractmethod
    def bar_read(self, bar: int, offset: int, count: int) -> bytes:
        """A driver's read of a BAR other than the MSI-X one, within its size."""

    @abstractmethod
    def bar_write(self, bar: int, offset: int, data: bytes) -> None:
        """A driver's write to a BAR other than the MSI-X one, within its size."""

    @abstractmethod
    def step(self, work: Work) -> None:
        """Do one piece of work, in any of the device's threads."""

    @abstractmethod
    def failed(self, work: Work) -> None:
        """A step raised what it should not have raised."""

    @abstractmethod
    def wake(self) -> None:
        """Memory was mapped, or the device was started: kick what may have work now."""

    @abstractmethod
    def update_line(self) -> None:
        """Something that the INTx line depends on has changed."""

    @abstractmethod
    def reset_function(self) -> None:
        """Everything but the configuration space goes to its initial state. No step runs."""

    @abstractmethod
    def client_lost(self) -> frozenset[int]:
        """The client went. Returns the vectors whose last signal it may not have seen.

        No step runs; memory is still mapped and must not be used.
        """

    @abstractmethod
    def save_function(self) -> bytes:
        """The state of everything but configuration space and interrupts. No step runs."""

    @abstractmethod
    def load_function(self, state: bytes) -> Callable[[], None]:
        """Check a saved state and return what makes it the device's. Raises `StateStreamError`."""

    @abstractmethod
    def function_identity(self) -> bytes:
        """What has to be the same on both sides of a migration."""

    # What a client asks for.

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(DeviceFlags.PCI | DeviceFlags.RESET, PCI_NUM_REGIONS, PCI_NUM_IRQS)

    def region_info(self, index: int) -> RegionInfo:
        # Nothing is offered for mapping: a register that bypasses the socket cannot be captured.
        size = self._sizes.get(index, 0)
        return RegionInfo(index, RegionFlags.READ | RegionFlags.WRITE if size else 0, size)

    def irq_info(self, index: int) -> IrqInfo:
        return self.interrupts.info(index)

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        self._check_range(region, offset, count)
        if region == PciRegion.CONFIG:
            return self.config_read(offset, count)
        if region == self._msix_bar:
            return self._msix_read(offset, count)
        return self.bar_read(region, offset, count)

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        self._check_range(region, offset, len(data))
        if region == PciRegion.CONFIG:
            self.config_write(offset, data)
        elif region == self._msix_bar:
            self._msix_table.write(offset, data)
        else:
            self.bar_write(region, offset, data)

    def config_read(self, offset: int, count: int) -> bytes:
        return self.config.read(offset, count)

    def config_write(self, offset: int, data: bytes) -> None:
        self.config.write(offset, data)
        self._follow_config()

    def set_irqs(self, request: SetIrqs, fds: list[int]) -> None:
        self.interrupts.set_irqs(request, fds)
        self.update_line()

    def dma_map(self, region: DmaMap, fd: int | None) -> None:
        self.memory.map(region, fd)
        self.wake()

    def dma_unmap(self, region: DmaUnmap) -> None:
        """Returns when every request in flight is completed and nothing refers to the region."""
        with self.workers.quiet():
            self.memory.unmap(region.address, region.size)

    def reset(self) -> None:
        with self.workers.quiet():
            self.config.reset()
            self._msix_table.reset()
            self.interrupts.reset()
            self.reset_function()
        if self.migration is not None:
            self.migration.reset()
        self._follow_config()

    def attached(self, dma: DmaPort) -> None:
        self.memory.attach(dma)
        self.workers.release(Hold.NO_CLIENT)

    def detached(self) -> None:
        """Work that is running gives up; what it did not complete is done again later."""
        self.memory.lose()
        self.workers.hold(Hold.NO_CLIENT)
        self.interrupts.disconnect(self.client_lost())
        self.memory.unmap_all()
        if self.log is not None:
            self.log.stop()
        if self.migration is not None:
            self.migration.client_lost()

    def feature(self, request: Feature) -> bytes:
        gets = bool(request.flags & FeatureFlags.GET)
        sets = bool(request.flags & FeatureFlags.SET)
        getter, setter = self._getters.get(request.index), self._setters.get(request.index)
        if not (getter or setter) or (gets and not getter) or (sets and not setter):
            raise VfioUserError(errno.ENOTSUP, f"feature {request.index} cannot do this")
        if request.is_probe:
            return b""
        handler = getter if gets else setter
        return handler(request.data) if handler is not None else b""

    def migration_read(self, size: int) -> bytes:
        return self._require_migration().read(size)

    def migration_write(self, data: bytes) -> None:
        self._require_migration().write(data)

    def close(self) -> None:
        """End the device's threads. Only for a device that no server serves any more."""
        self.workers.close()

    # What `Migration` needs.

    def stop(self) -> None:
        self.workers.hold(Hold.STOPPED)

    def start(self) -> None:
        self.workers.release(Hold.STOPPED)
        self.wake()

    def identity(self) -> bytes:
        return self.config.read(0, 4) + self.function_identity()

    def save(self) -> bytes:
        pending = sorted(self.interrupts.pending())
        table = self._msix_table.read(0, len(self._msix_table))
        return b"".join(
            (
                self.config.save(),
                struct.pack(f"<H{len(pending)}H", len(pending), *pending),
                table,
                self.save_function(),
            )
        )

    def load(self, identity: bytes, state: bytes) -> None:
        if identity != self.identity():
            raise StateStreamError("the state is from a device that is built differently")
        fixed = self.config.size + 2
        if len(state) < fixed:
            raise StateStreamError("the state is truncated")
        config = state[: self.config.size]
        try:
            self.config.check(config)
        except PciStateError as error:
            raise StateStreamError(str(error)) from error
        (n_pending,) = struct.unpack_from("<H", state, self.config.size)
        table = fixed + 2 * n_pending
        function = table + len(self._msix_table)
        if function > len(state):
            raise StateStreamError("the state is truncated")
        pending = frozenset(struct.unpack_from(f"<{n_pending}H", state, fixed))
        if any(vector >= self.interrupts.n_vectors for vector in pending):
            raise StateStreamError("an interrupt that the device does not have")
        take_over = self.load_function(state[function:])
        with self.workers.quiet():
            self.config.load(config)
            self._msix_table.write(0, state[table:function])
            take_over()
            self.memory.unsettle()
        self.interrupts.set_pending(pending)
        self._follow_config()

    def _check_range(self, region: int, offset: int, count: int) -> None:
        if offset + count > self._sizes.get(region, 0):
            raise VfioUserError(errno.EINVAL, f"{count} bytes at {offset:#x} of region {region}")

    def _follow_config(self) -> None:
        if self.config.command & Command.BUS_MASTER:
            self.workers.release(Hold.NO_BUS_MASTER)
        else:
            self.workers.hold(Hold.NO_BUS_MASTER)
        self.update_line()

    def _msix_read(self, offset: int, count: int) -> bytes:
        content = bytearray(MSIX_BAR_BYTES)
        content[: len(self._msix_table)] = self._msix_table.read(0, len(self._msix_table))
        for vector in self.interrupts.pending():
            content[MSIX_PBA_OFFSET + vector // 8] |= 1 << vector % 8
        return bytes(content[offset : offset + count])

    def _require_migration(self) -> Migration:
        if self.migration is None:
            raise VfioUserError(errno.ENOTSUP, "the device does not offer migration")
        return self.migration

    def _get_migration(self, _data: bytes) -> bytes:
        return MigrationFlags(MigrationSupport.STOP_COPY | MigrationSupport.PRE_COPY).pack()

    def _get_state(self, _data: bytes) -> bytes:
        return MigState(self._require_migration().state).pack()

    def _set_state(self, data: bytes) -> bytes:
        migration = self._require_migration()
        migration.set_state(MigState.unpack(data).device_state)
        return MigState(migration.state).pack()

    def _require_log(self) -> DirtyLog:
        if self.log is None:
            raise VfioUserError(errno.ENOTSUP, "the device cannot log")
        return self.log

    def _start_logging(self, data: bytes) -> bytes:
        control = LoggingControl.unpack(data)
        try:
            page_bytes = self._require_log().start(control.page_size, control.ranges)
        except DirtyLogError as error:
            raise VfioUserError(errno.EINVAL, str(error)) from error
        return LoggingControl(page_bytes, control.ranges).pack()

    def _stop_logging(self, _data: bytes) -> bytes:
        self._require_log().stop()
        return b""

    def _report(self, data: bytes) -> bytes:
        request = LoggingReport.unpack(data)
        try:
            bitmap = self._require_log().report(request.iova, request.length, request.page_size)
        except DirtyLogError as error:
            raise VfioUserError(errno.EINVAL, str(error)) from error
        return LoggingReport(request.iova, request.length, request.page_size, bitmap).pack()
