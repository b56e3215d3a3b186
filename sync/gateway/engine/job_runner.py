"""Runs one job at a time at the device: a generator that yields commands and is sent the answers.

Sans-IO. Owned here: the order, the bound on what is under way, and the deadline. A job that holds
the guest's accesses back has one deadline from its start to its end, any other has it anew for each
list of commands. What does not meet it, and whatever else is wrong with an answer, is the job's
failure, and nothing more.

A list of commands is sent back to back, up to `WINDOW` at a time; the device executes commands in
the order in which they come ("Command Concurrency" in the vfio-user specification).
"""

import errno
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from sync.errors import SyncError
from sync.gateway.datapath.relay import Relay
from sync.gateway.errors import DeviceRefused, DeviceTimeout, told
from sync.vfio_user.errors import errno_text
from sync.vfio_user.framing import close_fds
from sync.vfio_user.protocol import HEADER_BYTES

WINDOW = 32

T = TypeVar("T")


class Call(NamedTuple):
    """A command for the device. The descriptor stays the caller's. `patience_s`: a list of commands
    with it has so much longer than the usual deadline."""

    command: int
    body: bytes = b""
    descriptor: int | None = None
    patience_s: float = 0.0


@dataclass(slots=True)
class Answer:
    """Its reply: an errno or 0; the body; descriptors, closed with the answer if not taken out; and
    what the errno means in this case, where that is known."""

    error: int
    body: bytes = b""
    descriptors: list[int] = field(default_factory=list)
    reason: str = ""

    def expect(self, what: str) -> bytes:
        """The body. Raises `DeviceRefused` if this is an error."""
        if self.error:
            reason = self.reason or errno_text(self.error)
            raise DeviceRefused(f"the device refuses {what}: {reason}")
        return self.body


Job = Generator[list[Call], list[Answer], T]
Done = Callable[[object, SyncError | None], None]


class JobRunner:
    """`clock` gives seconds that never go back; `deadline_s` is the limit described above."""

    def __init__(self, relay: Relay, clock: Callable[[], float], deadline_s: float) -> None:
        self._relay = relay
        self._clock = clock
        self._deadline_s = deadline_s
        self._job: Job[object] | None = None
        self._done: Done | None = None
        self._calls: list[Call] = []
        self._answers: list[Answer | None] = []
        self._sent = 0
        self._missing = 0
        self._turn = 0
        self._held = False
        self._holding = False
        self.deadline: float | None = None
        self.explain: Callable[[], str] = lambda: ""
        """Why the command whose reply is being taken was refused: from a device in our process."""
        self.on_late_end: Callable[[], None] = lambda: None
        """Called when a job has ended that had been `overdue`."""

    @property
    def busy(self) -> bool:
        return self._job is not None

    def start(self, job: Job[object], done: Done, *, held: bool) -> None:
        """Runs `job`, then calls `done` with its result or its error.

        With `held` the guest's accesses are held back before the first step until `done` has
        returned. A job begins when the VMM's own changes of the DMA map are through.
        """
        self._job = job
        self._done = done
        self._held = held
        self.deadline = self._clock() + self._deadline_s
        if self._relay.holding:
            self._relay.on_quiet = self._begin
        else:
            self._begin()

    def _begin(self) -> None:
        if self._job is None:
            return
        if self._held:
            self._holding = True
            self._relay.hold()
        self._step(None)

    @property
    def overdue(self) -> bool:
        """Whether a job is under way that nobody waits for any more."""
        return self._holding and self.deadline is None

    def expire(self, now: float) -> None:
        """Ends a job that takes too long, for whoever waits for it. Never the device's connection:
        a VMM that has lost its device does not connect again.

        One that has begun to change the device goes on when the device answers, to an end in which
        the device is known, and the guest's accesses wait for it as they would without a job.
        """
        if self.deadline is None or now < self.deadline:
            return
        if not self._holding:
            self._finish(None, DeviceTimeout())
            return
        done, self._done = self._done, self._ended_late
        self.deadline = None
        assert done is not None
        done(None, DeviceTimeout())

    def _ended_late(self, result: object, error: SyncError | None) -> None:
        self.on_late_end()

    def forgive(self, seconds: float) -> None:
        """Does not count a time in which nothing here could be done."""
        if self.deadline is not None:
            self.deadline += seconds

    def abort(self, error: SyncError) -> None:
        """Ends what is running, for the device or the VMM has gone."""
        if self.busy:
            self._finish(None, error)

    def _step(self, answers: list[Answer] | None) -> None:
        job = self._job
        assert job is not None
        try:
            if answers is None:
                calls = next(job)
            else:
                calls = job.send(answers)
            while not calls:
                calls = job.send([])
        except StopIteration as stop:
            self._finish(stop.value, None)
            return
        except Exception as error:
            self._finish(None, told(error))
            return
        finally:
            for answer in answers or ():
                close_fds(answer.descriptors)
        self._calls = calls
        self._answers = [None] * len(calls)
        self._sent = 0
        self._missing = len(calls)
        self._turn += 1
        if not self._held:
            patience_s = max(call.patience_s for call in calls)
            self.deadline = self._clock() + self._deadline_s + patience_s
        self._fill()

    def _fill(self) -> None:
        while self._sent < len(self._calls):
            under_way = self._sent - (len(self._calls) - self._missing)
            if under_way >= WINDOW:
                return
            number = self._sent
            self._sent += 1
            call = self._calls[number]
            try:
                passed = [] if call.descriptor is None else [os.dup(call.descriptor)]
            except OSError as error:
                self._answered(self._turn, number, error.errno or errno.EMFILE, b"", [])
                continue
            self._relay.ask(call.command, call.body, passed, self._receiver(number))

    def _receiver(self, number: int) -> Callable[[int, memoryview, list[int]], None]:
        turn = self._turn

        def answered(error: int, reply: memoryview, descriptors: list[int]) -> None:
            self._answered(turn, number, error, bytes(reply[HEADER_BYTES:]), descriptors)

        return answered

    def _answered(
        self, turn: int, number: int, error: int, body: bytes, descriptors: list[int]
    ) -> None:
        if turn != self._turn or self._job is None:
            close_fds(descriptors)
            return
        self._answers[number] = Answer(error, body, descriptors, self.explain() if error else "")
        self._missing -= 1
        if self._missing:
            self._fill()
            return
        answers = [answer for answer in self._answers if answer is not None]
        self._answers = []
        self._step(answers)

    def _finish(self, result: object, error: SyncError | None) -> None:
        job, done = self._job, self._done
        assert job is not None and done is not None
        self._job = self._done = None
        self.deadline = None
        self._turn += 1
        for answer in self._answers:
            if answer is not None:
                close_fds(answer.descriptors)
        self._calls = []
        self._answers = []
        self._sent = 0
        holding, self._held, self._holding = self._holding, False, False
        job.close()
        try:
            done(result, error)
        finally:
            if holding:
                self._relay.let_go()
