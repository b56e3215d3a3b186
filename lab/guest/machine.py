"""The virtual machine as its VMM sees it: run states, and who may change them.

    INMIGRATE -> PAUSED (loaded) -> RUNNING <-> PAUSED (stop, cont)
    RUNNING -> FINISH_MIGRATE -> POSTMIGRATE (completed) -> RUNNING (cont)
                              -> RUNNING (cancelled, failed)
    any -> INTERNAL_ERROR (the guest's driver gave up)

Names and rules are QEMU's (qapi/run-state.json, `qmp_cont`, `qmp_stop`). Called by the QMP thread,
the migration's threads and, for a panic, the vCPU's.
"""

import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from lab.guest.device_link import DeviceLink
from lab.guest.errors import GuestPanic, MigrationRefused
from lab.guest.layout import Layout
from lab.guest.nvme import NvmeDriver
from lab.guest.options import GuestOptions
from lab.guest.ram import Ram
from lab.guest.vcpu import Vcpu
from lab.guest.virtio_blk import BlockDriver
from lab.guest.workload import Workload

END_TIMEOUT_S = 2.0

EmitEvent = Callable[[str, dict[str, Any]], None]


class RunState(StrEnum):
    """The states of a VMM that `query-status` tells, by QEMU's names."""

    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    INTERNAL_ERROR = "internal-error"


class Machine:
    """The guest's RAM, CPU and device. `emit` gets QMP events, from any thread."""

    def __init__(
        self, options: GuestOptions, emit: EmitEvent, on_ready: Callable[[str | None], None]
    ) -> None:
        self.options = options
        self.ram = Ram(options.low_bytes, options.high_bytes)
        layout = Layout.of(options)
        self._link = DeviceLink(
            options.device_path, self.ram, irq=options.irq, rom_bytes=options.rom_bytes
        )
        self._workload = Workload(self.ram, layout, options)
        kind = NvmeDriver if options.disk == "nvme" else BlockDriver
        self._driver = kind(self.ram, layout, options, self._link, self._workload)
        self._vcpu = Vcpu(
            self._driver,
            self._workload,
            self._link,
            device_deadline_s=options.device_deadline_s,
            on_ready=on_ready,
            on_panic=self._panic,
        )
        self._emit = emit
        self._lock = threading.RLock()
        self._state = RunState.INMIGRATE if options.incoming else RunState.RUNNING
        self._before_migration = RunState.RUNNING
        self._start_when_loaded = False
        self._failure = ""

    @property
    def state(self) -> RunState:
        return self._state

    def start(self) -> None:
        """Connects to the device; a guest that waits for no migration boots."""
        self._vcpu.start(running=self._state is RunState.RUNNING)

    def stop(self) -> None:
        """QMP `stop`."""
        with self._lock:
            if self._state is RunState.INMIGRATE:
                self._start_when_loaded = False
            elif self._state is RunState.RUNNING:
                self._pause(RunState.PAUSED)

    def cont(self) -> None:
        """QMP `cont`. Raises `MigrationRefused` while the state does not allow it."""
        with self._lock:
            if self._state is RunState.INMIGRATE:
                self._start_when_loaded = True
            elif self._state is RunState.FINISH_MIGRATE:
                raise MigrationRefused("Migration is not finalized yet")
            elif self._state is RunState.INTERNAL_ERROR:
                raise MigrationRefused(f"the guest cannot go on: {self._failure}")
            elif self._state is not RunState.RUNNING:
                self._resume()

    def pause_for_migration(self) -> None:
        """The guest stands still while its migration ends. Raises `GuestPanic` if it gave up."""
        with self._lock:
            self._before_migration = self._state
            if self._state is RunState.RUNNING:
                self._pause(RunState.FINISH_MIGRATE)
            elif self._state is RunState.PAUSED:
                self._state = RunState.FINISH_MIGRATE
            if self._state is not RunState.FINISH_MIGRATE:
                raise GuestPanic(f"the guest cannot go on: {self._failure}")

    def end_migration(self, *, completed: bool) -> None:
        """Back to what the guest was before an outgoing migration, or to POSTMIGRATE."""
        with self._lock:
            if completed:
                self._state = RunState.POSTMIGRATE
            elif self._state is RunState.FINISH_MIGRATE:
                if self._before_migration is RunState.RUNNING:
                    self._resume()
                else:
                    self._state = self._before_migration

    def save(self) -> dict[str, Any]:
        """What the VM is, beside its RAM. It has to stand still."""
        return self._vcpu.save()

    def load(self, state: dict[str, Any]) -> None:
        """Becomes the VM that was saved; PAUSED afterwards, unless `cont` came before.

        Raises `StreamError` for a state that is malformed.
        """
        self._vcpu.load(state)
        with self._lock:
            self._state = RunState.PAUSED
            if self._start_when_loaded:
                self._resume()

    def start_verification(self) -> int:
        """Has the guest read back everything it has written; returns the verification's number."""
        return self._vcpu.call(self._workload.start_verification)

    def report(self) -> dict[str, Any]:
        """`x-guest-report`: the members of `report.Counters` and `report.Verification`, and what
        the VMM knows: state, why the guest gave up, requests in flight."""
        verification = self._workload.verification
        return {
            "state": str(self._state),
            "failure": self._failure,
            "device_id": self._workload.device_id,
            "outstanding": self._driver.outstanding(),
            "oldest_outstanding_s": self._driver.oldest_outstanding_s(time.time()),
            "access_errors": self._link.access_errors,
            "longest_access_s": self._link.longest_access_s,
            **self._workload.counters.to_json(),
            "verification": {"state": verification.state, **verification.to_json()},
        }

    def abandon(self) -> None:
        """Ends every wait for a vCPU that may hang in an access. Safe in a signal handler."""
        self._vcpu.abandon()

    def close(self) -> None:
        """Ends everything. The process is about to go."""
        self._vcpu.stop(END_TIMEOUT_S)
        self._link.close()

    def _pause(self, state: RunState) -> None:
        self._vcpu.pause()
        if self._state is RunState.RUNNING:
            self._state = state
            self._emit("STOP", {})

    def _resume(self) -> None:
        self._state = RunState.RUNNING
        self._emit("RESUME", {})
        self._vcpu.resume()

    def _panic(self, reason: str) -> None:
        # Without the lock: whoever holds it may be waiting for this very thread.
        self._failure = reason
        self._state = RunState.INTERNAL_ERROR
        self._emit("STOP", {})
