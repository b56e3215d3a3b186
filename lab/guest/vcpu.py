"""The guest's only CPU: a thread that runs the driver and the workload, or stands still.

Owns when the guest may touch its device: between `pause` and `resume` it does not, not even to
look for interrupts. Also owns what happens when the device goes: it is connected again, by the
VMM while the guest stands still and by the driver once it runs.
"""

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lab.guest.device_link import MAX_VECTORS, DeviceLink
from lab.guest.disk_driver import DiskDriver
from lab.guest.errors import DeviceLost, GuestError, GuestPanic, StreamError
from lab.guest.fields import Fields
from lab.guest.workload import Workload

RECONNECT_S = 0.05
PROBE_S = 0.5
"""How long the connection to the device may be silent before it is asked for."""

ABANDON_POLL_S = 0.2

T = TypeVar("T")


class Vcpu:
    """Runs `driver` for `workload` on `link`'s device.

    `on_ready(failure)` is called once, when the device is connected or is not to be had (then
    `failure` says why); `on_panic(reason)` when the guest cannot go on. Both come from the vCPU's
    thread.
    """

    def __init__(
        self,
        driver: DiskDriver,
        workload: Workload,
        link: DeviceLink,
        *,
        device_deadline_s: float,
        on_ready: Callable[[str | None], None],
        on_panic: Callable[[str], None],
    ) -> None:
        self._driver = driver
        self._workload = workload
        self._link = link
        self._device_deadline_s = device_deadline_s
        self._on_ready = on_ready
        self._on_panic = on_panic
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._changed = threading.Condition()
        self._run = False
        self._parked = False
        self._ended = False
        self._quit = False
        self._abandoned = False
        self._jobs: list[Callable[[], None]] = []
        self._latched: set[int] = set()
        self._loaded = False
        self._lost_since: float | None = None
        self._driver_recovers = False
        self._poll = select.poll()
        self._polled: list[int] = []
        self._thread = threading.Thread(target=self._main, name="vcpu", daemon=True)

    def start(self, *, running: bool) -> None:
        """Connects to the device and, if `running`, boots."""
        self._run = running
        self._thread.start()

    def pause(self) -> None:
        """Returns when the guest stands still: it makes no access any more.

        Raises `GuestError` if that is given up because the process ends.
        """
        with self._changed:
            self._run = False
            self._wake()
            while not (self._parked or self._ended):
                self._check_abandoned()
                self._changed.wait(ABANDON_POLL_S)

    def resume(self) -> None:
        """Lets the guest run."""
        with self._changed:
            if not self._ended:
                self._run = True
                self._parked = False
                self._wake()

    def call(self, job: Callable[[], T]) -> T:
        """Runs `job` in the vCPU's thread, between two steps of it, and returns its result.

        Raises whatever `job` raises, and `GuestError` if the process ends before.
        """
        results: list[T] = []
        errors: list[Exception] = []
        done = threading.Event()

        def run_job() -> None:
            try:
                results.append(job())
            except Exception as error:
                errors.append(error)
            done.set()

        with self._changed:
            if self._ended:
                return job()
            self._jobs.append(run_job)
            self._wake()
        while not done.wait(ABANDON_POLL_S):
            self._check_abandoned()
        if errors:
            raise errors[0]
        return results[0]

    def save(self) -> dict[str, Any]:
        """The state of a paused guest beside its RAM."""

        def collect() -> dict[str, Any]:
            # An interrupt that came too late to be handled here is one that the target handles.
            self._latched |= self._link.take_interrupts()
            return {
                "driver": self._driver.state(),
                "workload": self._workload.state(),
                "irqs": len(self._link.vectors) if self._link.irqs_on else 0,
                "latched": sorted(self._latched),
            }

        return self.call(collect)

    def load(self, state: dict[str, Any]) -> None:
        """Becomes the guest that was saved; the device is not initialised, it is trusted to live.

        Raises `StreamError`.
        """

        def apply() -> None:
            fields = Fields(state, "state")
            irqs = fields.number("irqs", MAX_VECTORS)
            latched = fields.items("latched", MAX_VECTORS)
            if any(type(vector) is not int or not 0 <= vector < irqs for vector in latched):
                raise StreamError("an interrupt that the guest does not have")
            self._workload.load_state(fields.object("workload"))
            self._driver.load_state(fields.object("driver"))
            self._workload.counters.migrations += 1
            self._latched = set(latched)
            self._loaded = True
            try:
                self._link.remap_low()
                if irqs:
                    self._link.irqs_enable(irqs)
            except DeviceLost:
                self._note_loss()

        self.call(apply)

    def abandon(self) -> None:
        """Ends every wait for this thread, which may hang in an access. Takes no lock."""
        self._abandoned = True

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; does not wait longer than `timeout_s` for it."""
        with self._changed:
            self._quit = True
            self._wake()
        self._link.close()
        self._thread.join(timeout_s)

    def _check_abandoned(self) -> None:
        if self._abandoned:
            raise GuestError("the guest is ending")

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)
        self._changed.notify_all()

    def _main(self) -> None:
        try:
            self._connect_first()
        except GuestError as error:
            self._end()
            self._on_ready(str(error))
            return
        self._on_ready(None)
        try:
            while not self._quit:
                self._take_step()
        except Exception as error:
            self._end()
            if not self._quit:
                self._on_panic(f"{type(error).__name__}: {error}")
        else:
            self._end()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            jobs, self._jobs = self._jobs, []
            self._changed.notify_all()
        for job in jobs:
            job()

    def _connect_first(self) -> None:
        deadline = time.monotonic() + self._device_deadline_s
        while True:
            try:
                self._link.connect(machine_init=True)
                return
            except DeviceLost:
                if self._quit or time.monotonic() >= deadline:
                    raise
            self._sleep(RECONNECT_S)

    def _take_step(self) -> None:
        self._run_jobs()
        with self._changed:
            running = self._run
            self._parked = not running
            if not running:
                self._changed.notify_all()
        try:
            if self._link.lost or self._lost_since is not None:
                self._reconnect(running)
            elif not running:
                self._stand_still()
            else:
                self._execute()
        except DeviceLost:
            self._note_loss()

    def _stand_still(self) -> None:
        if not self._sleep(PROBE_S):
            self._link.probe()

    def _execute(self) -> None:
        if not self._driver.started:
            # Firmware has been here before: it leaves the low region mapped anew.
            self._link.remap_low()
            self._driver.start()
        elif self._driver_recovers:
            self._driver.recover()
        self._driver_recovers = False
        now = time.time()
        if self._polled != self._link.vectors:
            self._watch_vectors()
        idle_s = self._workload.idle_s(now, slots_free=self._driver.slots_free)
        # At least a millisecond counts as sleeping: a rate above 1000/s comes in bursts.
        for fd, _ in self._poll.poll(max(0.0, idle_s) * 1000):
            if fd == self._wake_fd:
                self._drain_wake()
        fired = self._latched | self._link.take_interrupts()
        self._latched = set()
        if fired:
            self._driver.interrupt(fired)
        if self._run:
            self._driver.fill()
            self._workload.cpu_work(time.time())
        self._link.probe_if_silent(PROBE_S)

    def _reconnect(self, running: bool) -> None:
        if self._lost_since is None:
            self._note_loss()
        since = self._lost_since or time.monotonic()
        try:
            # A machine that has run nothing yet and loaded nothing is initialised once more.
            self._link.connect(machine_init=not self._driver.started and not self._loaded)
        except DeviceLost as error:
            if running and time.monotonic() - since > self._device_deadline_s:
                raise GuestPanic(f"the device did not come back: {error}") from error
            self._sleep(RECONNECT_S)
            return
        self._lost_since = None

    def _note_loss(self) -> None:
        self._link.close()
        if self._lost_since is None:
            self._lost_since = time.monotonic()
        self._driver_recovers = self._driver.started

    def _run_jobs(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    return
                job = self._jobs.pop(0)
            job()

    def _sleep(self, seconds: float) -> bool:
        """Sleeps until somebody wants something of this thread; whether that happened."""
        ready, _, _ = select.select([self._wake_fd], [], [], seconds)
        if ready:
            self._drain_wake()
        return bool(ready)

    def _drain_wake(self) -> None:
        try:
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            return

    def _watch_vectors(self) -> None:
        self._poll = select.poll()
        self._polled = list(self._link.vectors)
        for fd in (self._wake_fd, *self._polled):
            self._poll.register(fd, select.POLLIN)
