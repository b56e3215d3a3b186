"""Brings a source's guest back to running when the controller that migrated it has died.

Blocking and with nothing but the standard library behind it: the gateway calls it from a thread.
The rule itself is `states.resume_step`.
"""

import os
import socket
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sync.vmm.errors import VmmBusy, VmmError, VmmGone, VmmNotReady, VmmRefused
from sync.vmm.qmp import QmpCore, QmpFailure, QmpGreeting, QmpReply
from sync.vmm.settings import MigrationSettings
from sync.vmm.states import (
    RUNNING,
    ResumeStep,
    in_words,
    migration_status_of,
    resume_step,
    run_state_of,
)

RETRY_S = 0.02
GREETING_S = 1.0
"""A VMM that does not greet for so long has a client that hangs."""
READ_BYTES = 1 << 16


def obstacle(qmp_path: str) -> str:
    """Why `recover_source` could not reach the VMM at `qmp_path`, or nothing. Does not connect: a
    VMM serves one client at a time."""
    path = Path(qmp_path)
    if not path.is_absolute():
        return "it is no absolute path"
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return "it is no socket"
    except OSError as error:
        return str(error.strerror)
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        return "this user may not open it"
    return ""


def socket_made(qmp_path: str) -> tuple[int, int, int] | None:
    """What tells a socket's file from one that takes its place, whose number may be the same. None
    where there is none."""
    try:
        status = Path(qmp_path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def recover_source(
    qmp_path: str,
    deadline_s: float,
    put_back: str = "",
    *,
    ran: bool = True,
    end_holder: Callable[[], None] | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> str:
    """Has the guest of the VMM at `qmp_path` run again; returns what was needed, in words.

    `put_back` are settings that the VMM then gets back, as `MigrationSettings.pack` gives them.

    A VMM serves one QMP client at a time, and the connection of one that was killed may linger:
    connecting is tried until the deadline. Only for a source that has not let go of its guest.
    `ran` is that of `states.resume_step`. `end_holder` ends the process that may hold the
    connection and hang: it is called once, if the VMM does not greet. `wanted` is asked before
    anything is done to the VMM, which others may have taken over by then.
    Raises `VmmNotReady` when the guest cannot run or does not run in time, `VmmGone` when the
    VMM is not there, `QmpProtocolError` when it talks nonsense.
    """
    deadline = time.monotonic() + deadline_s
    done: list[str] = []
    problem: VmmError = VmmGone(f"no VMM at {qmp_path} in {deadline_s:g} s")
    while time.monotonic() < deadline:
        try:
            greeted_by = deadline
            if end_holder is not None:
                greeted_by = min(deadline, time.monotonic() + GREETING_S)
            with _Connection(qmp_path, deadline, greeted_by) as connection:
                state = _resume(connection, done, ran, wanted)
                if put_back:
                    _put_back(connection, done, MigrationSettings.unpack(put_back))
        except (VmmGone, OSError) as error:
            if end_holder is not None and isinstance(error, VmmBusy):
                end_holder()
                end_holder = None
                done.append("the process that held QMP and hung was ended")
            problem = error if isinstance(error, VmmGone) else VmmGone(f"{qmp_path}: {error}")
            time.sleep(RETRY_S)
            continue
        if state not in RUNNING:
            done.append(f"the guest is {in_words(state)} and is left so")
        return ", ".join(done) if done else f"the guest was {in_words(state)}"
    raise problem


def _resume(
    connection: "_Connection",
    done: list[str],
    ran: bool,
    wanted: Callable[[], bool],
) -> str:
    """Returns the run state in the end."""
    known = ""
    while True:
        # With the VMM's only connection in hand: nobody else can begin anything with it.
        if not wanted():
            raise VmmNotReady("the VMM there is another one, or its guest was moved since")
        try:
            # In this order: a migration that ends between both answers is seen as under way.
            status = migration_status_of(connection.execute("query-migrate"))
            state = run_state_of(connection.execute("query-status"))
            step = resume_step(state, status, ran=ran)
            if step is ResumeStep.NOTHING:
                return state
            known = f"the guest is still {state!r} (migration {status!r})"
            # Refused, the state has moved on meanwhile; if it has not, the deadline ends this.
            with suppress(VmmRefused):
                if step is not ResumeStep.WAIT:
                    connection.execute(step.value)
                    what = f"{step.value} from {status if step is ResumeStep.CANCEL else state}"
                    if what not in done:
                        done.append(what)
        except TimeoutError as error:
            if known:
                raise VmmNotReady(known) from error
            raise
        time.sleep(RETRY_S)


def _put_back(connection: "_Connection", done: list[str], settings: MigrationSettings) -> None:
    """The guest runs: what the VMM refuses now is told, and nothing else comes of it."""
    for command, arguments in settings.commands():
        try:
            connection.execute(command, arguments)
        except VmmRefused as error:
            done.append(f"its settings are not as before: {error}")


class _Connection:
    """A QMP connection, negotiated. Every wait ends at `deadline` with `TimeoutError`, that for the
    greeting at `greeted_by` with `VmmBusy`."""

    def __init__(self, path: str, deadline: float, greeted_by: float) -> None:
        self._deadline = greeted_by
        self._core = QmpCore()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._set_timeout()
            self._socket.connect(path)
            try:
                while not isinstance(self._next_message(), QmpGreeting):
                    pass
            except TimeoutError as error:
                raise VmmBusy("the VMM does not greet: another client has it") from error
            self._deadline = deadline
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_unused: object) -> None:
        self._socket.close()

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        request_id, data = self._core.command(command, arguments)
        self._set_timeout()
        self._socket.sendall(data)
        while True:
            message = self._next_message()
            if isinstance(message, QmpReply) and message.request_id == request_id:
                return message.result
            if isinstance(message, QmpFailure) and message.request_id == request_id:
                raise VmmRefused(command, message.error_class, message.description)

    def _next_message(self) -> object:
        while (message := self._core.next_message()) is None:
            self._set_timeout()
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise VmmGone("the VMM closed its connection")
            self._core.feed(data)
        return message

    def _set_timeout(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the VMM did not answer in time")
        self._socket.settimeout(left)
