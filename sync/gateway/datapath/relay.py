"""Between one VMM and one device: whose message is it, and whose answer.

Sans-IO: messages in (from `from_vmm`, `from_device`), messages out through the functions given.
Owned here: the message ids towards either side, the origin of each request that is under way,
commands of the gateway's own (`ask`), and holding the VMM's commands back. Not owned: which
commands are more than relayed (`snoops`, `traps` put themselves into `vmm_commands`), the device's
access to guest memory (`dma_service`), and sockets.

Ids: the VMM's command gets an id of ours on its way to the device and its own again on the way
back; so our commands can go between. All posted commands (NO_REPLY) get one that no other has: a
reply to such a one, which should not be, is dropped. The device's commands get an id of ours on
their way to the VMM likewise.

An exception of a handler costs the one message: it is told to `on_defect`, and the VMM's command is
answered with an error.

    VMM  -- 7: REGION_READ -->  gateway  -- 41: REGION_READ -->  device
                                         -- 42: FEATURE ------>              (ours)
    VMM  <-- 7: reply --------  gateway  <-- 41: reply ---------
                                         <-- 42: reply ---------

A relay lives as long as one connection to the device. Source: vfio-user, "Command Concurrency".
"""

import errno
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sync.gateway.datapath.peer import LOST
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.framing import close_fds
from sync.vfio_user.protocol import (
    FLAG_NO_REPLY,
    FLAG_REPLY,
    FLAG_TYPE_MASK,
    HEADER,
    HEADER_BYTES,
    encode_message,
)

Buffer = bytes | bytearray | memoryview
Send = Callable[[Buffer, Sequence[int]], None]
"""Sends a message with its descriptors; takes those over. The buffer is read before the next
message comes in from where it came from."""
Answered = Callable[[int, memoryview, list[int]], None]
"""Gets the reply to a command: errno or 0, the whole message, its descriptors (to own)."""
VmmCommand = Callable[[int, int, memoryview, list[int]], None]
"""Handles a command of the VMM: id, flags, the whole message, its descriptors. It takes those that
it owns out of the list before anything can raise `ProtocolError`."""

MAX_OUTSTANDING = 1024
"""Commands of the VMM under way to the device, or held; more wait in the VMM's socket. One read
may go beyond this by what fits into its buffer, which is far from the 65536 ids there are."""
MAX_HELD_BYTES = 1 << 20
"""What is read from the VMM while its commands are held back; more waits in its socket."""
MAX_DMA_OUTSTANDING = 256
"""Commands of the device under way to the VMM; more are refused (EBUSY)."""

POSTED_ID = 0xFFFF

_put_id = struct.Struct("<H").pack_into
_put_flags = struct.Struct("<I").pack_into
_FLAGS_OFFSET = 8


class UnderWay(NamedTuple):
    """A command that the device did not answer: `origin` as `Relay.forward` takes it, when it came,
    the message with its id."""

    origin: int | Answered
    since: float
    message: bytes


class Relay:
    """`to_vmm` is set while a VMM is attached."""

    def __init__(self, to_device: Send, clock: Callable[[], float] = time.monotonic) -> None:
        self.to_device = to_device
        self._clock = clock
        self.keeps = False
        """Whether what is under way to the device is kept, to be done again by another one."""
        self._kept: dict[int, tuple[float, bytes]] = {}
        self._settled: set[int] = set()
        self.to_vmm: Send | None = None
        self.vmm_commands: dict[int, VmmCommand] = {}
        """Commands that are not simply relayed; all others are."""
        self.device_command: Callable[[int, int, int, memoryview, Send], None] | None = None
        """Takes the device's commands: id, command, flags, message, the way back."""
        self._pending: dict[int, int | Answered] = {}
        self._last_id = 0
        self._vmm_pending: dict[int, tuple[int, Send]] = {}
        self._last_vmm_id = 0
        self._holds = 0
        self._held: deque[tuple[int, int, int, int, bytearray, list[int]]] = deque()
        self._held_bytes = 0
        self.on_quiet: Callable[[], None] | None = None
        """Called once when the last hold has been let go, before what was held goes on."""
        self.on_defect: Callable[[Exception], None] = lambda error: None
        self.vmm_error: ProtocolError | None = None
        """What was wrong with a command that had been held: the VMM is to be disconnected."""

    # --- from the VMM ---

    def from_vmm(
        self,
        message_id: int,
        command: int,
        flags: int,
        error: int,
        message: memoryview,
        descriptors: list[int],
    ) -> None:
        """Takes a message of the VMM. Raises `ProtocolError`: its connection is to be closed."""
        if flags & FLAG_TYPE_MASK == FLAG_REPLY:
            close_fds(descriptors)
            if message_id != POSTED_ID:
                self._vmm_reply(message_id, message)
            return
        if self._holds:
            self._held.append((message_id, command, flags, error, bytearray(message), descriptors))
            self._held_bytes += len(message)
            return
        handler = self.vmm_commands.get(command)
        if error:
            # Its descriptors were lost on the way here: nothing else has an errno.
            self.answer(message_id, flags, command, error=error)
        elif handler is not None:
            try:
                handler(message_id, flags, message, descriptors)
            except ProtocolError:
                close_fds(descriptors)
                raise
            except Exception as problem:
                close_fds(descriptors)
                self.on_defect(problem)
                self.answer(message_id, flags, command, error=errno.EIO)
        elif flags & FLAG_NO_REPLY:
            self.post(message, descriptors)
        else:
            self.forward(message_id, message, descriptors, message_id)

    def relay_command(
        self, message_id: int, flags: int, message: memoryview, descriptors: list[int]
    ) -> None:
        """Sends a command of the VMM on as it is."""
        if flags & FLAG_NO_REPLY:
            self.post(message, descriptors)
        else:
            self.forward(message_id, message, descriptors, message_id)

    def post(self, message: memoryview, descriptors: Sequence[int]) -> None:
        """Sends a command on that is not answered."""
        _put_id(message, 0, POSTED_ID)
        self.to_device(message, descriptors)

    def forward(
        self,
        message_id: int,
        message: memoryview,
        descriptors: Sequence[int],
        origin: int | Answered,
    ) -> None:
        """Sends a command on under an id of ours. `origin` is the VMM's id for a reply that is
        only relayed, or takes the reply."""
        pending = self._pending
        ours = (self._last_id + 1) % POSTED_ID
        while ours in pending:
            ours = (ours + 1) % POSTED_ID
        self._last_id = ours
        pending[ours] = origin
        if self.keeps:
            self._kept[ours] = (self._clock(), bytes(message))
        _put_id(message, 0, ours)
        self.to_device(message, descriptors)

    def snoop(
        self,
        flags: int,
        message: memoryview,
        descriptors: Sequence[int],
        answered: Answered,
    ) -> None:
        """Sends a command of the VMM on and has `answered` take the reply, also to a posted one."""
        if flags & FLAG_NO_REPLY:
            _put_flags(message, _FLAGS_OFFSET, flags & ~FLAG_NO_REPLY)
        self.forward(0, message, descriptors, answered)

    def pass_back(self, message_id: int, message: memoryview, descriptors: list[int]) -> None:
        """Sends a reply of the device to the VMM's command `message_id`."""
        if self.to_vmm is None:
            close_fds(descriptors)
            return
        _put_id(message, 0, message_id)
        self.to_vmm(message, descriptors)

    def answer(
        self, message_id: int, flags: int, command: int, body: bytes = b"", error: int = 0
    ) -> None:
        """Answers a command of the VMM ourselves, unless it is posted."""
        if not flags & FLAG_NO_REPLY and self.to_vmm is not None:
            reply = encode_message(message_id, command, body, reply=True, error=error)
            self.to_vmm(reply, ())

    @property
    def vmm_blocked(self) -> bool:
        """Whether no more is to be read from the VMM for now."""
        return (
            len(self._pending) >= MAX_OUTSTANDING
            or len(self._held) >= MAX_OUTSTANDING
            or self._held_bytes > MAX_HELD_BYTES
        )

    @property
    def awaiting_device(self) -> bool:
        """Whether a command is under way to the device."""
        return bool(self._pending)

    # --- holding the VMM's commands back ---

    @property
    def holding(self) -> bool:
        return self._holds > 0

    def hold(self) -> None:
        """From here on the VMM's commands wait, until `let_go` was called as often."""
        self._holds += 1

    def let_go(self) -> None:
        self._holds -= 1
        if self._holds:
            return
        if self.on_quiet is not None:
            call, self.on_quiet = self.on_quiet, None
            call()
        while self._held and not self._holds:
            message_id, command, flags, error, message, descriptors = self._held.popleft()
            self._held_bytes -= len(message)
            try:
                self.from_vmm(message_id, command, flags, error, memoryview(message), descriptors)
            except ProtocolError as problem:
                self.vmm_error = problem
                return

    # --- our own commands ---

    def ask(
        self,
        command: int,
        body: bytes,
        descriptors: Sequence[int],
        answered: Answered,
        *,
        settled_by_loss: bool = False,
    ) -> None:
        """Sends the device a command of ours; `answered` takes the reply. `settled_by_loss`: it
        counts as done when the device goes, for the next one is told what it was about."""
        message = bytearray(HEADER_BYTES + len(body))
        HEADER.pack_into(message, 0, 0, command, len(message), 0, 0)
        message[HEADER_BYTES:] = body
        self.forward(0, memoryview(message), descriptors, answered)
        self._kept.pop(self._last_id, None)
        if settled_by_loss:
            self._settled.add(self._last_id)

    def lose_device(self) -> list[UnderWay]:
        """The device is gone: what was under way to it, in order, without our own commands."""
        self.to_device = _nowhere
        pending, self._pending = self._pending, {}
        kept, self._kept = self._kept, {}
        settled, self._settled = self._settled, set()
        self._vmm_pending = {
            ours: (theirs, _nowhere) for ours, (theirs, _) in self._vmm_pending.items()
        }
        for number in settled & pending.keys():
            answered = pending[number]
            if not isinstance(answered, int):
                answered(0, memoryview(bytearray(HEADER_BYTES)), [])
        return [
            UnderWay(origin, *kept[number]) for number, origin in pending.items() if number in kept
        ]

    # --- from the device ---

    def from_device(
        self,
        message_id: int,
        command: int,
        flags: int,
        error: int,
        message: memoryview,
        descriptors: list[int],
    ) -> None:
        """Takes a message of the device. Raises `ProtocolError`: its connection is to be closed."""
        if flags & FLAG_TYPE_MASK != FLAG_REPLY:
            close_fds(descriptors)
            self.from_twin(message_id, command, flags, message, self.to_device)
            return
        origin = self._pending.pop(message_id, None)
        if self.keeps:
            self._kept.pop(message_id, None)
        if isinstance(origin, int):
            self.pass_back(origin, message, descriptors)
        elif origin is None:
            close_fds(descriptors)
            if message_id != POSTED_ID:
                raise ProtocolError(f"a reply with id {message_id}, which nobody is waiting for")
        else:
            self._settled.discard(message_id)
            try:
                origin(error, message, descriptors)
            except ProtocolError:
                raise
            except Exception as problem:
                self.on_defect(problem)

    def from_twin(
        self, message_id: int, command: int, flags: int, message: memoryview, back: Send
    ) -> None:
        """Takes a command of the device; the reply goes `back`."""
        if self.device_command is None or flags & FLAG_TYPE_MASK == FLAG_REPLY:
            raise ProtocolError("a message that the device may not send here")
        try:
            self.device_command(message_id, command, flags, message, back)
        except ProtocolError:
            raise
        except Exception as problem:
            self.on_defect(problem)
            if not flags & FLAG_NO_REPLY:
                back(error_reply(message_id, command, errno.EIO), ())

    def forward_to_vmm(self, message_id: int, flags: int, message: memoryview, back: Send) -> bool:
        """Sends a command of the device to the VMM, the reply `back`; False if that cannot be."""
        if self.to_vmm is None or len(self._vmm_pending) >= MAX_DMA_OUTSTANDING:
            return False
        if flags & FLAG_NO_REPLY:
            _put_id(message, 0, POSTED_ID)
            self.to_vmm(message, ())
            return True
        ours = (self._last_vmm_id + 1) % POSTED_ID
        while ours in self._vmm_pending:
            ours = (ours + 1) % POSTED_ID
        self._last_vmm_id = ours
        self._vmm_pending[ours] = (message_id, back)
        _put_id(message, 0, ours)
        self.to_vmm(message, ())
        return True

    def _vmm_reply(self, message_id: int, message: memoryview) -> None:
        origin = self._vmm_pending.pop(message_id, None)
        if origin is None:
            raise ProtocolError(f"a reply with id {message_id}, which nobody is waiting for")
        theirs, back = origin
        _put_id(message, 0, theirs)
        back(message, ())

    # --- handing on to another process ---

    def held(self) -> list[tuple[bytearray, list[int]]]:
        """The VMM's commands that wait, with their descriptors; `LOST` where those did not come."""
        return [
            (message, descriptors or [LOST] * bool(error))
            for _, _, _, error, message, descriptors in self._held
        ]

    def questions(self) -> list[tuple[int, int, Send]]:
        """What the VMM has to answer the device: our id, the device's, and the way back."""
        return [(ours, theirs, back) for ours, (theirs, back) in self._vmm_pending.items()]

    def expect(self, ours: int, theirs: int, back: Send) -> None:
        """The VMM's answer to a command that another process has passed on."""
        self._vmm_pending[ours] = theirs, back

    def close(self) -> None:
        """Closes the descriptors of what was held."""
        for *_, descriptors in self._held:
            close_fds(descriptors)
        self._held.clear()
        self._pending.clear()
        self._kept.clear()
        self._settled.clear()
        self._vmm_pending.clear()
        self.to_vmm = None


def _nowhere(message: Buffer, descriptors: Sequence[int]) -> None:
    close_fds(list(descriptors))


def error_reply(message_id: int, command: int, number: int) -> bytes:
    """An error reply to a command of the device."""
    return encode_message(message_id, command, reply=True, error=number or errno.EIO)
