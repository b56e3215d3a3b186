"""Between a gateway and the process that takes its place: a socket pair, and who may go on when.

    old                                             new
     |-- starts it, with one end of the pair -------->|
     |<------------------------ hello: what it reads --|  has loaded everything
     |  holds its guest's accesses back               |
     |-- descriptors, state ------------------------->|  puts all together, touches no socket
     |<---------------------------------------- ready --|
     |-- go ----------------------------------------->|
     |<-------------------------------------- running --|  serves
     |  ends                                          |

Until `running` the old one can go on: it ends the new one first, and waits for its death. So the
new one that finds the line broken, with the whole state in its hands, knows that the old one is
dead, and goes on. Nothing here touches what is handed on.
"""

import os
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sync.gateway.control.wire import MAX_DESCRIPTORS, ControlDecoder, ControlMessage, encode
from sync.gateway.engine.inheritance import STATE_VERSION, Inherited, State, from_bytes, to_bytes
from sync.gateway.errors import ControlProtocolError, UpgradeFailed

ENVIRONMENT = "VFIO_FERRY_SUCCEEDS"
"""Has the number of the new process's end of the pair."""
START_S = 30.0
"""The new process has to say hello within this time; the guest does not wait for it."""
HAND_ON_S = 2.0
"""Each answer after that: the guest waits, whose VMM gives an access up after 5 s."""
_CHUNK_BYTES = 1 << 18


def own_command() -> tuple[str, ...]:
    """What started this process, to be started again: the script itself, where it is one, for
    another version has another interpreter."""
    script = Path(sys.argv[0]).absolute()
    if script.is_file() and os.access(script, os.X_OK):
        return (str(script), *sys.argv[1:])
    return (sys.executable, *sys.orig_argv[1:])


class _Line:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = ControlDecoder(MAX_DESCRIPTORS)

    def send(self, fields: Mapping[str, Any], blob: bytes = b"", files: Sequence[int] = ()) -> None:
        data = encode(dict(fields), blob)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", files))] if files else []
        sent = self._sock.sendmsg([data], rights)
        self._sock.sendall(data[sent:])

    def receive(self, timeout_s: float | None) -> ControlMessage | None:
        """The next message, or None at the end. Raises OSError (also TimeoutError)."""
        self._sock.settimeout(timeout_s)
        while (message := self._decoder.next_message()) is None:
            data, ancillary, _, _ = self._sock.recvmsg(
                _CHUNK_BYTES, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
            descriptors = array("i")
            for _, _, content in ancillary:
                descriptors.frombytes(content[: len(content) - len(content) % 4])
            if not data:
                return None
            self._decoder.feed(data, list(descriptors))
        return message

    def close(self) -> None:
        self._decoder.close()
        self._sock.close()


class Heir:
    """The new process, as the old one sees it. Raises OSError if it cannot be started."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, ENVIRONMENT: str(theirs.fileno())}
        environment.pop("WATCHDOG_PID", None)
        try:
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._sock = ours
        self._line = _Line(ours)
        self.pid = self._process.pid

    def fileno(self) -> int:
        """Readable when it has said hello, or has ended."""
        return self._sock.fileno()

    def greet(self) -> None:
        """Takes its hello. Raises `UpgradeFailed`."""
        message = self._answer("said hello")
        speaks = message.fields.get("reads")
        if not isinstance(speaks, list) or STATE_VERSION not in speaks:
            raise UpgradeFailed(
                f"the new version reads states of version {speaks!r:.40}, this one writes "
                f"{STATE_VERSION}: restart the gateway with its VM"
            )

    def hand_on(self, state: State, files: Sequence[int]) -> None:
        """Returns once the new process serves. Raises `UpgradeFailed`: then `end` it, and go on."""
        self._sock.settimeout(HAND_ON_S)
        try:
            for start in range(0, len(files), MAX_DESCRIPTORS):
                self._line.send({}, files=files[start : start + MAX_DESCRIPTORS])
            self._line.send({"version": STATE_VERSION}, to_bytes(state))
        except BrokenPipeError:
            pass  # what it has said, or how it has ended, comes next
        except (OSError, ControlProtocolError) as error:
            raise UpgradeFailed(f"the state cannot be handed on: {error}") from error
        self._answer("was ready")
        with suppress(OSError):
            self._line.send({"go": True})
        try:
            self._answer("served")
        except UpgradeFailed:
            if not self._serves():
                raise

    def _serves(self) -> bool:
        """Whether it has said so after all. It is stopped meanwhile, so that it does not just now;
        and goes on only if it had."""
        if self._process.poll() is not None:
            return False
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            serves = self._line.receive(0) is not None
        except (OSError, ControlProtocolError):
            return False
        if serves:
            os.kill(self.pid, signal.SIGCONT)
        return serves

    def _answer(self, did: str) -> ControlMessage:
        try:
            message = self._line.receive(HAND_ON_S)
        except ConnectionResetError:
            message = None
        except (OSError, ControlProtocolError) as error:
            raise UpgradeFailed(f"the new process hung before it {did} ({error})") from error
        if message is None:
            raise UpgradeFailed(f"the new process ended before it {did}: {self._how_it_ended()}")
        if refusal := message.fields.get("refused"):
            raise UpgradeFailed(f"the new process refuses: {refusal}")
        return message

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(HAND_ON_S)
        except subprocess.TimeoutExpired:
            return "it closed its line"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Ends the process, and returns when it is dead."""
        self._process.kill()
        self._process.wait()
        self._line.close()

    def leave(self) -> None:
        """It goes on by itself."""
        self._process.returncode = 0
        self._line.close()


class Predecessor:
    """The old process, as the new one sees it."""

    def __init__(self, sock: socket.socket) -> None:
        self._line = _Line(sock)

    def inherit(self) -> Inherited:
        """Says hello, and waits for what is handed on. Raises `UpgradeFailed`, OSError and what a
        malformed state does."""
        self._line.send({"reads": [STATE_VERSION]})
        files: list[int] = []
        while (message := self._line.receive(None)) is not None:
            files += message.descriptors
            if "version" in message.fields:
                return Inherited(from_bytes(message.blob), files)
        raise UpgradeFailed("the gateway that was to be replaced has ended")

    def refuse(self, reason: str) -> None:
        self._line.send({"refused": reason})

    def ready(self) -> None:
        """Everything is put together: returns when it is to be used."""
        with suppress(OSError):  # it is dead, for it would have ended us first
            self._line.send({"ready": True})
            self._line.receive(None)

    def running(self) -> None:
        """From here on the other one is the gateway no more."""
        with suppress(OSError):
            self._line.send({"running": True})
        self._line.close()


def predecessor() -> Predecessor | None:
    """Whose place this process is to take, if anybody's. A second call finds nobody."""
    number = os.environ.pop(ENVIRONMENT, "")
    if not number.isdecimal():
        return None
    os.set_inheritable(int(number), False)
    return Predecessor(socket.socket(fileno=int(number)))
