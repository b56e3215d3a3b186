"""The control socket of a running `send`: what it is at, a cancel, other limits.

One request and one answer a connection, each a line of JSON. The socket is of mode 0600, in a
folder where nobody else may write. What a request may be is `REQUESTS`; how the clients find the
socket without being told is `socket_of_only_send`.
"""

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ferry.config import milliseconds, rate
from ferry.errors import ConfigError, LocalError
from ferry.exit_codes import describe
from ferry.migration.send_options import Options
from ferry.nurseries import alongside
from ferry.private import check_private
from ferry.progress import bytes_text
from sync.vfio_user.sockets import file_identity, listen_unix, unlink_unix

REQUESTS = ("status", "cancel", "set")
MAX_REQUEST_BYTES = 65536
ANSWER_S = 10.0

_SETTINGS: dict[str, Callable[[str], Any]] = {
    "bandwidth": lambda text: None if text == "none" else rate(text),
    "downtime_limit": milliseconds,
    "on_stall": str,
}


def runtime_folder() -> Path:
    """Where sockets of this user are that have no other place; made if need be, mode 0700.

    Raises OSError, and `LocalError` if it is not this user's alone.
    """
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        folder = Path(base) / "vfio-ferry"
    elif os.geteuid() == 0:
        folder = Path("/run/vfio-ferry")
    else:
        folder = Path("/tmp") / f"vfio-ferry-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)
    return folder


def socket_of_only_send() -> Path:
    """The control socket of the one `send` that runs. Raises `LocalError` if it is not one."""
    found = sorted(path for path in runtime_folder().glob("send-*.sock") if _is_alive(path))
    if len(found) != 1:
        which = ", ".join(map(str, found))
        how = f"these run: {which}" if found else "no `send` of this user runs"
        raise LocalError(f"{how}; --control-socket says which one is meant")
    return found[0]


def _is_alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(os.fspath(path))
        return True
    return False


def settings(options: Options) -> dict[str, Any]:
    """What of `options` can be changed, as it is."""
    return {name: getattr(options, name) for name in _SETTINGS}


def settings_text(values: dict[str, Any]) -> str:
    """What `settings` tells, in words."""
    rate = values.get("bandwidth")
    bandwidth = "none" if rate is None else f"{bytes_text(rate)}/s"
    return (
        f"bandwidth {bandwidth}, downtime limit {values.get('downtime_limit')} ms, on stall "
        f"{values.get('on_stall')}"
    )


def changed(options: Options, wanted: dict[str, Any]) -> Options:
    """`options` with these settings, given as a user writes them. Raises `ConfigError`."""
    values: dict[str, Any] = {}
    for name, text in wanted.items():
        flag = "--" + name.replace("_", "-")
        try:
            values[name] = _SETTINGS[name](str(text))
        except KeyError:
            raise ConfigError(f"{flag} cannot be changed while a migration runs") from None
        except ValueError as error:
            raise ConfigError(f"{flag} is {text!r}; it has to be {error}") from error
    if values.get("on_stall", "abort") not in ("switch", "abort"):
        raise ConfigError("--on-stall has to be switch or abort")
    return replace(options, **values)


@dataclass(frozen=True)
class Steering:
    """What a request can reach."""

    status: Callable[[], dict[str, Any]]
    cancel: Callable[[], None]
    change: Callable[[dict[str, Any]], dict[str, Any]]
    """Takes settings, returns those in force."""


def answer(request: bytes, steering: Steering) -> dict[str, Any]:
    """The answer to one line."""
    try:
        wanted = json.loads(request)
        if not isinstance(wanted, dict) or wanted.get("do") not in REQUESTS:
            raise ConfigError(f"not one of {', '.join(REQUESTS)}")
        if wanted["do"] == "cancel":
            steering.cancel()
            return {"ok": True}
        if wanted["do"] == "status":
            return {"ok": True, **steering.status()}
        values = wanted.get("settings")
        if not isinstance(values, dict) or not values:
            raise ConfigError("nothing to set")
        return {"ok": True, **steering.change(values)}
    except (ValueError, RecursionError, ConfigError) as error:
        return {"ok": False, "message": describe(error)}


@contextlib.asynccontextmanager
async def control_socket(path: str | None, steering: Steering) -> AsyncIterator[None]:
    """Answers at `path` for as long as the context lasts; None is a place of this user's own, and
    none where there is no such place.

    Raises `LocalError` and OSError if it cannot listen at a path that was given.
    """
    try:
        at = Path(path) if path else runtime_folder() / f"send-{os.getpid()}.sock"
        check_private(at.absolute().parent)
        listening = listen_unix(at)
    except (OSError, LocalError):
        if path:
            raise
        listening = None
    if listening is None:
        yield
        return
    identity = file_identity(at)
    listening.setblocking(False)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))

    async def serve(stream: trio.SocketStream) -> None:
        with trio.move_on_after(ANSWER_S), contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                request = await _line(stream)
                await stream.send_all(json.dumps(answer(request, steering)).encode() + b"\n")

    try:
        async with alongside(partial(trio.serve_listeners, serve, [listener])):
            yield
    finally:
        unlink_unix(at, identity)


async def _line(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < MAX_REQUEST_BYTES:
        more = await stream.receive_some(4096)
        if not more:
            break
        data += more
    return data


def ask(path: str | None, request: dict[str, Any]) -> dict[str, Any]:
    """What the `send` at `path`, or the only one, answers. Raises `LocalError`, `ConfigError`."""
    at = Path(path) if path else socket_of_only_send()
    check_private(at)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(os.fspath(at))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as file:
                reply = json.loads(file.readline(1 << 20))
        except (OSError, ValueError) as error:
            raise LocalError(f"no `send` answers at {at}: {describe(error)}") from error
    if not reply.pop("ok", False):
        raise ConfigError(str(reply.get("message")))
    found: dict[str, Any] = reply
    return found
