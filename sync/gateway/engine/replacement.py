"""A planned change to another device process, while the guest runs.

Sans-IO. Owned here: the course of it, and the way back. Not owned: the steps (`comeback`), the
sockets (`loop`), and who may ask for it (`requests`).

    prepare   the new device is asked everything, compared, reset        the guest's works on
    switch    the VMM's commands are held back from here
                 leave    the guest's device comes to rest, its state is read
                 arrive   the new one gets memory, interrupts and state, and starts
              the VMM's commands go to the new one
    stay      whatever fails before: the guest's device goes on where it was

The state is the device's own stream where both have one, else what its profile knows.
"""

from collections.abc import Callable
from enum import Enum

from sync.errors import SyncError
from sync.gateway.datapath.dma import AtDevice
from sync.gateway.engine import comeback
from sync.gateway.engine.comeback import Left, Successor
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.errors import DeviceLost, DeviceTimeout, WrongState
from sync.registers.snapshot import Values

End = Callable[[SyncError | None], None]


class Step(Enum):
    PREPARING = "preparing"
    PREPARED = "prepared"
    LEAVING = "leaving"
    ARRIVING = "arriving"
    STAYING = "staying"
    DONE = "done"


class Replacement:
    """Of the device on `link` by `successor`, whose socket `path` names. `swap` has the sockets
    follow, `drop` closes the successor's; each is called once at most."""

    def __init__(
        self,
        link: DeviceLink,
        successor: Successor,
        path: str,
        clock: Callable[[], float],
        hold_s: float,
        swap: Callable[[], None],
        drop: Callable[[], None],
    ) -> None:
        self.step = Step.PREPARING
        self.successor = successor
        self.path = path
        self.held_s = 0.0
        self.native = False
        self.old_gone = ""
        """Why the guest's device has gone meanwhile; '' while it is there."""
        self._link = link
        self._clock = clock
        self._hold_s = hold_s
        self._swap = swap
        self._drop = drop
        self._fresh: Values = {}
        self._until: float | None = None
        self._done: End = lambda error: None

    @property
    def moving(self) -> bool:
        """Whether the guest's device is at rest and the new one gets its state."""
        return self.step is Step.ARRIVING

    def prepare(self, done: End) -> None:
        """Raises nothing; `done` hears why it cannot be."""

        def ended(fresh: object, error: SyncError | None) -> None:
            if error is None:
                assert isinstance(fresh, dict)
                self._fresh = fresh
                self.native = comeback.moves_natively(self._link, self.successor.facts)
                self.step = Step.PREPARED
            else:
                self._end()
            done(error)

        job = comeback.prepare(self._link, self.successor.facts)
        self.successor.runner.start(job, ended, held=False)

    def switch(self, done: End) -> None:
        """Raises `WrongState` unless it is prepared. The guest's accesses are held until `done`."""
        if self.step is not Step.PREPARED:
            raise WrongState(f"a device that is {self.step.value!r} cannot be switched to")
        self.step = Step.LEAVING
        self._done = done
        self.held_s = self._clock()
        self._until = self.held_s + self._hold_s

        def left(result: object, error: SyncError | None) -> None:
            if self.step is not Step.LEAVING:
                return
            if error is not None:
                self._fail(error)
                return
            assert isinstance(result, Left)
            # The job's own hold ends when this returns.
            self._link.relay.hold()
            self._arrive(result)

        job = comeback.leave(self._link, self.native, lambda: self.step is Step.LEAVING)
        self._link.runner.start(job, left, held=True)
        # What the device takes too long for is undone when it answers.
        if self._link.runner.busy:
            self._link.runner.deadline = self._until - self._hold_s / 2

    def device_gone(self, reason: str) -> None:
        """The guest's device has gone while the new one gets its state, which is all there is to
        know."""
        self.old_gone = reason

    def successor_gone(self, reason: str) -> None:
        error = DeviceLost(f"the new device is gone: {reason}")
        if self.successor.runner.busy:
            self.successor.runner.abort(error)
        elif self.step is Step.PREPARED:
            self._end()

    def abandon(self, error: SyncError) -> None:
        """Nobody asks for it any more. What has begun comes to its end."""
        if self.step is Step.PREPARING:
            self.successor.runner.abort(error)
        elif self.step is Step.PREPARED:
            self._end()

    def expire(self, now: float) -> None:
        self.successor.runner.expire(now)
        if self.moving and self._until is not None and now >= self._until:
            self.successor.runner.abort(DeviceTimeout("the new device did not start in time"))

    def _arrive(self, left: Left) -> None:
        self.step = Step.ARRIVING

        def arrived(_: object, error: SyncError | None) -> None:
            if error is not None:
                self._stay(error)
                return
            self.step = Step.DONE
            self._swap()
            self._finish(None)
            self._link.relay.let_go()

        job = comeback.arrive(self._link, self.successor.facts, left)
        self.successor.runner.start(job, arrived, held=False)

    def _stay(self, error: SyncError) -> None:
        """The guest's device goes on: it has its state, and gets its memory back."""
        self.step = Step.STAYING
        for region in self._link.memory.regions:
            # What the guest's device has: with its own state stream it kept all of it.
            region.at_device = AtDevice.DIRECT if self.native else AtDevice.NOT
        if self.old_gone:
            self._fail(error)
            self._link.relay.let_go()
            return

        def stayed(_: object, problem: SyncError | None) -> None:
            self._fail(error)

        self._link.runner.start(comeback.stay(self._link, self.native), stayed, held=True)
        # The job begins when nothing is held any more, and holds at once.
        self._link.relay.let_go()

    def _fail(self, error: SyncError) -> None:
        self._end()
        self._finish(error)

    def _finish(self, error: SyncError | None) -> None:
        self.held_s = self._clock() - self.held_s
        self._done(error)

    def _end(self) -> None:
        self.step = Step.DONE
        self.successor.close()
        self._drop()
