"""The guest's own live migration: what QEMU does with RAM and vCPU state, and no more than that.

Owns the statuses, capabilities and parameters that QMP shows, and the two threads that move the
stream. The device is not among what is moved, nor are pages that it wrote behind the VMM's back
after they were sent once. Source: QEMU's qapi/migration.json, migration/migration.c.

    outgoing: SETUP -> ACTIVE -> [PRE_SWITCHOVER ->] DEVICE -> COMPLETED
              all but COMPLETED -> CANCELLING -> CANCELLED, or -> FAILED
    incoming: SETUP -> ACTIVE -> COMPLETED or FAILED
"""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lab.guest.errors import MigrationRefused, StreamError
from lab.guest.machine import EmitEvent, Machine, RunState
from lab.guest.rounds import apply_record, dirty_chunks
from lab.guest.stream import CHUNK_PAGES, StreamReader, StreamWriter, VmState
from sync.memory import PAGE_BYTES
from sync.vfio_user.sockets import listen_unix

DEFAULT_DOWNTIME_LIMIT_MS = 300
DEFAULT_BANDWIDTH_BYTES_PER_S = 128 << 20
"""QEMU's default."""
MAX_DOWNTIME_LIMIT_MS = 2_000_000
IDLE_S = 0.02
"""Between two looks at the dirty bitmap when there is hardly anything to send."""
CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 1 << 18
CAPABILITY_NAMES = ("events", "pause-before-switchover")


class MigrationStatus(StrEnum):
    """What `query-migrate` tells of a migration, by QEMU's names."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


UNDER_WAY = frozenset(
    {
        MigrationStatus.SETUP,
        MigrationStatus.ACTIVE,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
        MigrationStatus.CANCELLING,
    }
)


@dataclass(slots=True)
class Statistics:
    """What `query-migrate` tells of an outgoing migration."""

    transferred_bytes: int = 0
    zero_pages: int = 0
    sent_pages: int = 0
    remaining_pages: int = 0
    rounds: int = 0
    dirty_pages_per_s: int = 0
    downtime_ms: int = 0
    started_at: float = 0.0
    ended_at: float = 0.0


class _Cancelled(Exception):
    """`migrate_cancel` came."""


class Migration:
    """Both directions of one machine's migration. Commands come from the QMP thread."""

    def __init__(self, machine: Machine, emit: EmitEvent) -> None:
        self._machine = machine
        self._emit = emit
        self._changed = threading.Condition()
        self._status = MigrationStatus.NONE
        self._error = ""
        self._capabilities = dict.fromkeys(CAPABILITY_NAMES, False)
        self._downtime_limit_ms = DEFAULT_DOWNTIME_LIMIT_MS
        self._bandwidth = DEFAULT_BANDWIDTH_BYTES_PER_S
        self._statistics = Statistics()
        self._outgoing = False
        self._cancel = False
        self._continue = False
        self._socket: socket.socket | None = None
        self._incoming_started = False

    def capabilities(self) -> list[dict[str, Any]]:
        """`query-migrate-capabilities`."""
        return [{"capability": name, "state": state} for name, state in self._capabilities.items()]

    def set_capabilities(self, capabilities: dict[str, bool]) -> None:
        """`migrate-set-capabilities`. Raises `MigrationRefused`."""
        with self._changed:
            self._refuse_if_under_way()
            unknown = sorted(set(capabilities) - set(self._capabilities))
            if unknown:
                raise MigrationRefused(f"capability {unknown[0]!r} is not known")
            self._capabilities.update(capabilities)

    def parameters(self) -> dict[str, int]:
        """`query-migrate-parameters`."""
        return {"downtime-limit": self._downtime_limit_ms, "max-bandwidth": self._bandwidth}

    def set_parameters(self, parameters: dict[str, int]) -> None:
        """`migrate-set-parameters`; may come at any time. Raises `MigrationRefused`."""
        limits = {"downtime-limit": MAX_DOWNTIME_LIMIT_MS, "max-bandwidth": (1 << 63) - 1}
        for name, value in parameters.items():
            if name not in limits:
                raise MigrationRefused(f"parameter {name!r} is not known")
            if type(value) is not int or not 0 <= value <= limits[name]:
                raise MigrationRefused(f"parameter {name!r} has to be from 0 to {limits[name]}")
        with self._changed:
            self._downtime_limit_ms = parameters.get("downtime-limit", self._downtime_limit_ms)
            self._bandwidth = parameters.get("max-bandwidth", self._bandwidth)
            self._changed.notify_all()

    def query(self) -> dict[str, Any]:
        """`query-migrate`."""
        if self._status is MigrationStatus.NONE:
            return {}
        answer: dict[str, Any] = {"status": str(self._status)}
        if self._error:
            answer["error-desc"] = self._error
        if self._outgoing:
            statistics = self._statistics
            until = statistics.ended_at or time.monotonic()
            answer["total-time"] = int((until - statistics.started_at) * 1000)
            if self._status is MigrationStatus.COMPLETED:
                answer["downtime"] = statistics.downtime_ms
            else:
                answer["expected-downtime"] = self._downtime_limit_ms
            answer["ram"] = {
                "transferred": statistics.transferred_bytes,
                "remaining": statistics.remaining_pages * PAGE_BYTES,
                "total": self._machine.ram.size,
                "duplicate": statistics.zero_pages,
                "normal": statistics.sent_pages,
                "normal-bytes": statistics.sent_pages * PAGE_BYTES,
                "dirty-pages-rate": statistics.dirty_pages_per_s,
                "dirty-sync-count": statistics.rounds,
                "page-size": PAGE_BYTES,
                "mbps": 0.0,
            }
        return answer

    def start_outgoing(self, uri: str) -> None:
        """`migrate`. Returns at once. Raises `MigrationRefused`."""
        path = _path_of(uri)
        with self._changed:
            self._refuse_if_under_way()
            if self._machine.state is RunState.INMIGRATE:
                raise MigrationRefused("Guest is waiting for an incoming migration")
            if self._machine.state is RunState.INTERNAL_ERROR:
                raise MigrationRefused("the guest has given up")
            if self._machine.state is RunState.POSTMIGRATE:
                raise MigrationRefused(
                    "Can't migrate the vm that was paused due to previous migration"
                )
            self._outgoing = True
            self._cancel = self._continue = False
            self._error = ""
            self._statistics = Statistics(started_at=time.monotonic())
            self._set_status(MigrationStatus.SETUP)
        threading.Thread(target=self._send, args=(path,), name="migration-out", daemon=True).start()

    def start_incoming(self, uri: str) -> None:
        """`migrate-incoming`: listens. Raises `MigrationRefused`, also the second time."""
        path = _path_of(uri)
        with self._changed:
            if not self._machine.options.incoming:
                raise MigrationRefused("'-incoming' was not specified on the command line")
            if self._incoming_started:
                raise MigrationRefused("The incoming migration has already been started")
            try:
                listener = listen_unix(path)
            except OSError as error:
                raise MigrationRefused(f"Failed to listen at {path}: {error}") from error
            self._incoming_started = True
            self._socket = listener
            self._set_status(MigrationStatus.SETUP)
        threading.Thread(
            target=self._receive, args=(listener, path), name="migration-in", daemon=True
        ).start()

    def proceed(self, state: str) -> None:
        """`migrate-continue`. Raises `MigrationRefused` outside that state."""
        with self._changed:
            here = MigrationStatus.PRE_SWITCHOVER
            if state != here or self._status is not here:
                raise MigrationRefused(f"Migration not in expected state: {self._status}")
            self._continue = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """`migrate_cancel`. Without a migration it does nothing."""
        with self._changed:
            if not self._outgoing or self._status not in UNDER_WAY:
                return
            self._set_status(MigrationStatus.CANCELLING)
            self._cancel = True
            self._shut_socket()
            self._changed.notify_all()

    def close(self) -> None:
        """The process is about to go: ends whatever is under way."""
        with self._changed:
            self._cancel = True
            self._shut_socket()
            self._changed.notify_all()

    def wait(self, seconds: float, *, until_limit_is_not_ms: int | None = None) -> None:
        """Lets time pass. Raises `_Cancelled` as soon as the migration is cancelled."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._cancel or until_limit_is_not_ms not in (None, self._downtime_limit_ms)
                ),
                seconds,
            )
        self._check_cancelled()

    def _send(self, path: str) -> None:
        error = ""
        status = MigrationStatus.FAILED
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(CONNECT_TIMEOUT_S)
                connection.connect(path)
                connection.settimeout(None)
                self._own_socket(connection)
                self._send_all(_Sink(connection, self))
            status = MigrationStatus.COMPLETED
        except _Cancelled:
            status = MigrationStatus.CANCELLED
        except Exception as failure:
            # Whatever it was: it is the migration that fails, not the guest.
            error = f"{type(failure).__name__}: {failure}"
        with self._changed:
            self._socket = None
            if self._cancel:
                status, error = MigrationStatus.CANCELLED, ""
            self._error = error
            # The run state comes first: whoever sees the end may rely on it.
            self._statistics.ended_at = time.monotonic()
            self._machine.end_migration(completed=status is MigrationStatus.COMPLETED)
            self._set_status(status)

    def _send_all(self, sink: "_Sink") -> None:
        ram, writer = self._machine.ram, StreamWriter()
        self._advance(MigrationStatus.ACTIVE)
        sink.send(writer.hello(self._machine.options.geometry()))
        ram.mark_all()
        self._send_rounds(sink, writer)
        self._machine.pause_for_migration()
        paused_at = time.monotonic()
        if self._capabilities["pause-before-switchover"]:
            self._advance(MigrationStatus.PRE_SWITCHOVER)
            self._wait_for_continue()
        self._advance(MigrationStatus.DEVICE)
        self._send_dirty(sink, writer, paced=False)
        sink.send(writer.state(self._machine.save()) + writer.end())
        self._check_cancelled()
        self._statistics.downtime_ms = int((time.monotonic() - paused_at) * 1000)

    def _send_rounds(self, sink: "_Sink", writer: StreamWriter) -> None:
        """Sends what is dirty until the rest fits into the downtime limit."""
        while True:
            began = time.monotonic()
            limit_ms = self._downtime_limit_ms
            self._send_dirty(sink, writer, paced=True)
            pending = self._pending_pages()
            elapsed = max(time.monotonic() - began, 1e-6)
            self._statistics.dirty_pages_per_s = int(pending / elapsed)
            if pending < CHUNK_PAGES and not self._may_switch(pending, sink.bytes_per_s):
                self.wait(IDLE_S, until_limit_is_not_ms=limit_ms)
                pending = self._pending_pages()
            if self._may_switch(pending, sink.bytes_per_s):
                return

    def _may_switch(self, pending_pages: int, bytes_per_s: float) -> bool:
        limit_ms = self._downtime_limit_ms
        if not limit_ms:
            return not pending_pages and self._machine.options.switch_when_clean
        return pending_pages * PAGE_BYTES <= bytes_per_s * limit_ms / 1000

    def _pending_pages(self) -> int:
        pages = self._machine.ram.dirty_pages()
        self._statistics.remaining_pages = pages
        return pages

    def _send_dirty(self, sink: "_Sink", writer: StreamWriter, *, paced: bool) -> None:
        """One round over what was dirty when it began."""
        statistics = self._statistics
        statistics.rounds += 1
        for chunk in dirty_chunks(self._machine.ram, writer):
            self._check_cancelled()
            sink.send(chunk.records, pace_bytes_per_s=self._bandwidth if paced else 0)
            statistics.sent_pages += chunk.filled_pages
            statistics.zero_pages += chunk.zero_pages
            statistics.remaining_pages = chunk.remaining_pages
            statistics.transferred_bytes = sink.sent_bytes

    def _wait_for_continue(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._continue or self._cancel)
        self._check_cancelled()

    def _receive(self, listener: socket.socket, path: str) -> None:
        error = ""
        try:
            with listener:
                connection, _ = listener.accept()
            with contextlib.suppress(OSError):
                Path(path).unlink()
            with connection:
                self._own_socket(connection)
                self._advance(MigrationStatus.ACTIVE)
                self._load_all(connection)
        except _Cancelled:
            error = "the guest was ended"
        except Exception as failure:
            # Whatever it was: it is the migration that fails, not the guest.
            error = f"{type(failure).__name__}: {failure}"
        with self._changed:
            self._socket = None
            self._error = error
            self._set_status(MigrationStatus.FAILED if error else MigrationStatus.COMPLETED)

    def _load_all(self, connection: socket.socket) -> None:
        reader = StreamReader()
        buffer = memoryview(bytearray(READ_BYTES))
        state: dict[str, Any] = {}
        while not reader.ended:
            count = connection.recv_into(buffer)
            if not count:
                raise StreamError("the stream ended in the middle")
            reader.feed(buffer[:count])
            while (record := reader.next_record()) is not None:
                if isinstance(record, VmState):
                    state = record.state
                else:
                    apply_record(self._machine.ram, self._machine.options.geometry(), record)
        self._machine.load(state)

    def _own_socket(self, connection: socket.socket) -> None:
        with self._changed:
            if self._cancel:
                raise _Cancelled
            self._socket = connection

    def _shut_socket(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _advance(self, status: MigrationStatus) -> None:
        """To the next status, unless it was cancelled meanwhile."""
        with self._changed:
            if self._cancel:
                raise _Cancelled
            self._set_status(status)

    def _check_cancelled(self) -> None:
        if self._cancel:
            raise _Cancelled

    def _set_status(self, status: MigrationStatus) -> None:
        self._status = status
        if self._capabilities["events"]:
            self._emit("MIGRATION", {"status": str(status)})

    def _refuse_if_under_way(self) -> None:
        if self._status in UNDER_WAY:
            raise MigrationRefused("There's a migration process in progress")


class _Sink:
    """The sending end of a stream: counts, measures, and keeps to a bandwidth."""

    def __init__(self, connection: socket.socket, migration: Migration) -> None:
        self._connection = connection
        self._migration = migration
        self._busy_s = 1e-3
        self._free_at = time.monotonic()
        self.sent_bytes = 0

    @property
    def bytes_per_s(self) -> float:
        """How fast it was so far, pacing included."""
        return self.sent_bytes / self._busy_s

    def send(self, data: bytes, *, pace_bytes_per_s: int = 0) -> None:
        began = time.monotonic()
        self._connection.sendall(data)
        self.sent_bytes += len(data)
        now = time.monotonic()
        if pace_bytes_per_s:
            self._free_at = max(self._free_at, now - IDLE_S) + len(data) / pace_bytes_per_s
            if self._free_at > now:
                self._migration.wait(self._free_at - now)
        self._busy_s += time.monotonic() - began


def _path_of(uri: str) -> str:
    scheme, separator, path = uri.partition(":")
    if scheme != "unix" or not separator or not path:
        raise MigrationRefused(f"unknown migration protocol: {uri}")
    return path
