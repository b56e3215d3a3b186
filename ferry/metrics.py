"""Metrics of a migration for Prometheus, in a file that node_exporter's textfile collector reads.

Owns the names, which follow Prometheus' conventions, and what events they are made from. The file
is written anew, in one piece, with each event that changes it.
"""

from typing import Any

from ferry.errors import LocalError

FORMS = ("zero", "same", "delta", "copy", "lz4", "raw")
HELP = "write metrics for Prometheus to this file (of node_exporter's textfile collector)"


class MigrationMetrics:
    """Takes the events of one `send` or `receive` (`Reporter.observe`).

    Raises `LocalError` if the client library of Prometheus is not there, OSError if the file cannot
    be written.
    """

    def __init__(self, role: str, path: str) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, write_to_textfile
        except ImportError:
            raise LocalError(
                "--metrics-file needs prometheus_client: install it, or vfio-ferry[metrics]"
            ) from None
        self._registry = CollectorRegistry()
        self._path = path
        self._write = write_to_textfile

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(f"vfio_ferry_{role}_{name}", text, labels, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"vfio_ferry_{role}_{name}", text, labels, registry=self._registry)

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
        self._write(self._path, self._registry)

    def _take_end(self, values: dict[str, Any]) -> None:
        for what, count in values.get("wire_bytes", {}).items():
            self._wire.labels(what).set(count)
        self._duration.set(values["duration_s"])
        registers = values.get("registers", ())
        self._divergences.set(sum(sum(each.get("divergences", {}).values()) for each in registers))
