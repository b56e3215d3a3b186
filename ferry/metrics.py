"""Metrics of a migration, or of a gateway, for Prometheus: a file that node_exporter reads, or a
port of this host.

Owns the names, which follow Prometheus' conventions, and what events they are made from. The file
is written anew, in one piece, with each event that changes it; of a gateway every ten seconds. The
port is served by the client library's own server.
"""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ferry.errors import LocalError
from sync.memory import PAGE_BYTES

if TYPE_CHECKING:
    from sync.gateway.control.info import GatewayInfo

FORMS = ("zero", "same", "delta", "copy", "lz4", "raw")
HELP = "write metrics for Prometheus to this file (of node_exporter's textfile collector)"
PORT_HELP = "serve metrics for Prometheus at this port of 127.0.0.1, as /metrics"


GATEWAY_INTERVAL_S = 10.0


class _Outlet:
    """Where the metrics of one process are told: in a file, at a port, or both.

    Raises `LocalError` if the client library of Prometheus is not there or the file cannot be
    written, OSError if the port is taken.
    """

    def __init__(self, path: str | None, port: int | None) -> None:
        try:
            import prometheus_client
        except ImportError:
            raise LocalError(
                "metrics need prometheus_client: install it, or vfio-ferry[metrics]"
            ) from None
        self.client: Any = prometheus_client
        self.registry = prometheus_client.CollectorRegistry()
        self._path = path
        if path is not None and Path(path).exists() and not Path(path).is_file():
            # Each writing puts a new file into its place, be it a device.
            raise LocalError(f"cannot write {path}: there is something else than a file")
        try:
            self._write_file()
        except OSError as error:
            raise LocalError(f"cannot write {path}: {error.strerror}") from error
        if port is not None:
            prometheus_client.start_http_server(port, "127.0.0.1", self.registry)

    def write(self) -> None:
        """Writes the file, if there is one. That it cannot be written any more, as on a full disk,
        is no reason to end what it tells of."""
        with contextlib.suppress(OSError):
            self._write_file()

    def _write_file(self) -> None:
        if self._path is not None:
            self.client.write_to_textfile(self._path, self.registry)


class GatewayMetrics:
    """Takes the status of a gateway every `GATEWAY_INTERVAL_S`, and writes it from a thread of its
    own: the guest does not wait for a disk (I10). Raises as `_Outlet` does."""

    def __init__(self, path: str | None, port: int | None = None) -> None:
        self._outlet = _Outlet(path, port)
        client, registry = self._outlet.client, self._outlet.registry
        self._found: SimpleQueue[GatewayInfo] = SimpleQueue()
        self._due = 0.0

        def gauge(name: str, text: str, *labels: str) -> Any:
            name = f"vfio_ferry_gateway_{name}"
            return client.Gauge(name, text, labels, registry=registry)

        self._state = gauge("state", "1 for the state that the device is in", "state", "owner")
        self._device = gauge("device_connected", "Whether the device is there")
        self._vmm = gauge("vmm_connected", "Whether the VMM is there")
        self._journal = gauge("journal_records", "Register accesses that send has not taken")
        self._overflow = gauge("journal_overflow", "Whether the journal has overflowed")
        self._dropped = gauge("dropped_writes", "Register writes of the VMM not executed")
        self._memory = gauge("memory_bytes", "Guest memory that the device can reach")
        self._written = gauge("write_timestamp_seconds", "When this was written")
        self._outlet.write()
        threading.Thread(target=self._serve, daemon=True, name="metrics").start()

    def take(self, now: float, status: Callable[[], "GatewayInfo"]) -> None:
        """Asks for the status where it is due at `now`, a monotonic clock."""
        if now >= self._due:
            self._due = now + GATEWAY_INTERVAL_S
            self._found.put(status())

    def _serve(self) -> None:
        while True:
            self.write(self._found.get())

    def write(self, info: "GatewayInfo") -> None:
        """Writes the file with what a gateway's status says."""
        self._state.clear()
        self._state.labels(info.state, info.owner).set(1)
        self._device.set(info.device_connected)
        self._vmm.set(info.vmm_connected)
        self._journal.set(info.journal_records)
        self._overflow.set(info.journal_overflow)
        self._dropped.set(info.dropped_writes)
        self._memory.set(info.memory_pages * PAGE_BYTES)
        self._written.set_to_current_time()
        self._outlet.write()


class MigrationMetrics:
    """Takes the events of one `send` or `receive` (`Reporter.observe`); raises as `_Outlet`."""

    def __init__(self, role: str, path: str | None, port: int | None = None) -> None:
        self._outlet = _Outlet(path, port)
        client, registry = self._outlet.client, self._outlet.registry

        def gauge(name: str, text: str, *labels: str) -> Any:
            return client.Gauge(f"vfio_ferry_{role}_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Any:
            return client.Counter(f"vfio_ferry_{role}_{name}", text, labels, registry=registry)

        self._phase = gauge("phase", "1 for the phase that the migration is in", "phase")
        self._rounds = counter("rounds", "Rounds of pages sent")
        self._pages = counter("pages", "Pages sent, by form", "form")
        self._round_bytes = counter("round_bytes", "Bytes of rounds on the wire")
        self._remaining = gauge("remaining_bytes", "What is left to send")
        self._rate = gauge("throughput_bytes_per_second", "What crosses the link")
        self._dirty = gauge("dirty_bytes_per_second", "What the guest and its devices write")
        self._predicted = gauge("predicted_downtime_seconds", "If it were to switch over now")
        self._limit = gauge("downtime_limit_seconds", "What the user allows")
        self._downtime = gauge("downtime_seconds", "How long the guest stood still")
        self._downtime_phase = gauge("downtime_phase_seconds", "The downtime by phase", "phase")
        self._wire = gauge("wire_bytes", "Bytes that have crossed, by what they were", "what")
        self._duration = gauge("duration_seconds", "How long the migration took")
        self._divergences = gauge("register_divergences", "Reads that returned another value")
        self._exit = gauge("exit_code", "How it ended (vfio-ferry exit-codes)")
        self._ended = gauge("end_timestamp_seconds", "When it ended")
        self.take("", {})

    def take(self, name: str, values: dict[str, Any]) -> None:
        """Takes an event and writes the file."""
        if name == "phase":
            self._phase.clear()
            self._phase.labels(values["phase"]).set(1)
        elif name == "round":
            self._rounds.inc()
            self._round_bytes.inc(values["wire_bytes"])
            for form in FORMS:
                self._pages.labels(form).inc(values.get(form, 0))
        elif name == "progress":
            self._remaining.set(values["remaining_bytes"])
            self._rate.set(values["throughput_bytes_per_s"])
            self._dirty.set(values["dirty_bytes_per_s"])
            if values["predicted_downtime_ms"] is not None:
                self._predicted.set(values["predicted_downtime_ms"] / 1e3)
            self._limit.set(values.get("downtime_limit_ms", 0) / 1e3)
        elif name == "report":
            self._downtime.set(values["downtime_total_ms"] / 1e3)
            for phase, ms in values["downtime_ms"].items():
                self._downtime_phase.labels(phase).set(ms / 1e3)
        if name in ("report", "success"):
            self._take_end(values)
        if name in ("success", "error") and "exit_code" in values:
            self._exit.set(values["exit_code"])
            self._ended.set_to_current_time()
        self._outlet.write()

    def _take_end(self, values: dict[str, Any]) -> None:
        for what, count in values.get("wire_bytes", {}).items():
            self._wire.labels(what).set(count)
        self._duration.set(values["duration_s"])
        registers = values.get("registers", ())
        self._divergences.set(sum(sum(each.get("divergences", {}).values()) for each in registers))
