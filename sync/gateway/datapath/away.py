"""The VMM's commands while its device is gone and waited for.

Sans-IO. Owned here: what waits for the next device, and for how long: each command is answered
before the VMM gives it up, with an error if the device is not back by then. What sets up memory or
interrupts needs no device and does not wait (`snoops`).
"""

import errno
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sync.gateway.datapath.relay import Answered, Relay, UnderWay, VmmCommand
from sync.vfio_user.framing import close_fds
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    HEADER,
    Command,
    encode_message,
)

MAX_WAITING = 1024
"""More commands are answered with an error at once."""
_NEEDS_NO_DEVICE = (Command.DMA_MAP, Command.DMA_UNMAP, Command.DEVICE_SET_IRQS)


class _Waiting(NamedTuple):
    origin: int | Answered
    until: float
    flags: int
    message: bytearray
    was_sent: bool
    """To the device that is gone, which did not answer."""


class Away:
    """`hold_s`: how long a command waits; `patience_s`: since the loss, while any does."""

    def __init__(
        self, relay: Relay, clock: Callable[[], float], hold_s: float, patience_s: float
    ) -> None:
        self._relay = relay
        self._clock = clock
        self._hold_s = hold_s
        self._patience_until = clock() + patience_s
        self._waiting: deque[_Waiting] = deque()
        self.refused = 0
        """How many were answered with an error."""
        self.commands: dict[int, VmmCommand] = {
            command: self._command(command)
            for command in Command
            if command not in _NEEDS_NO_DEVICE
        }

    def under_way(self, left: list[UnderWay]) -> None:
        """What the device did not answer is done again by the next one."""
        for origin, since, message in left:
            _, command, _, flags, _ = HEADER.unpack_from(message)
            if command == Command.DEVICE_SET_IRQS and isinstance(origin, int):
                # The next device is told of all interrupts.
                self._relay.answer(origin, flags, command)
            else:
                until = since + self._hold_s
                self._waiting.append(_Waiting(origin, until, flags, bytearray(message), True))

    def expire(self, now: float) -> None:
        """Answers what has waited for long enough."""
        while self._waiting and now >= self._waiting[0].until:
            self._refuse(self._waiting.popleft())

    def go_on(self) -> None:
        """The device is back: what waits is done, in order."""
        waiting, self._waiting = self._waiting, deque()
        for origin, _, flags, message, was_sent in waiting:
            view = memoryview(message)
            if was_sent or not isinstance(origin, int):
                self._relay.forward(0, view, (), origin)
            else:
                self._relay.from_vmm(origin, HEADER.unpack_from(message)[1], flags, 0, view, [])

    def close(self) -> None:
        self._waiting.clear()

    def _command(self, command: Command) -> VmmCommand:
        def wait(message_id: int, flags: int, message: memoryview, descriptors: list[int]) -> None:
            close_fds(descriptors)
            now = self._clock()
            waiting = _Waiting(message_id, now + self._hold_s, flags, bytearray(message), False)
            if now < self._patience_until and len(self._waiting) < MAX_WAITING:
                self._waiting.append(waiting)
            else:
                self._refuse(waiting)

        return wait

    def _refuse(self, waiting: _Waiting) -> None:
        if waiting.flags & FLAG_NO_REPLY:
            return
        self.refused += 1
        _, command, *_ = HEADER.unpack_from(waiting.message)
        if isinstance(waiting.origin, int):
            self._relay.answer(waiting.origin, waiting.flags, command, error=errno.EIO)
        else:
            reply = encode_message(0, command, reply=True, error=errno.EIO)
            waiting.origin(errno.EIO, memoryview(bytearray(reply)), [])
