"""The process of a guest: VMM, driver and workload, until somebody ends it.

`python -m lab.guest.main JSON` runs one, with the options as `GuestOptions.to_json` writes them.
The main thread serves QMP; the vCPU and a migration under way have threads of their own.
"""

import json
import signal
import sys
import time
from types import FrameType

from lab.guest.errors import DeviceLost, GuestError
from lab.guest.machine import Machine
from lab.guest.migration import Migration
from lab.guest.monitor import commands
from lab.guest.options import GuestOptions
from lab.guest.qmp_server import QmpServer

SWITCH_INTERVAL_S = 0.0005
"""QMP has to be answered while the vCPU computes: the interpreter's 5 ms would be downtime."""
FLUSH_S = 0.5


def run(options: GuestOptions) -> None:
    """Runs a guest until QMP `quit` or SIGTERM; to be called in the main thread.

    Raises `GuestError` when there is no device or the options do not fit, and OSError.
    """
    _Process(options).run()


class _Process:
    def __init__(self, options: GuestOptions) -> None:
        self._options = options
        self._ended = False
        self._end_reason = ""
        self._failure: str | None = None
        self._machine = Machine(options, self._emit, self._on_ready)
        self._migration = Migration(self._machine, self._emit)
        self._server = QmpServer(
            options.qmp_path,
            commands(self._machine, self._migration, lambda: self._end("host-qmp-quit")),
        )

    def run(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self._machine.start()
            self._serve()
        finally:
            self._close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._failure is not None:
            raise DeviceLost(self._failure)

    def _serve(self) -> None:
        interval_s = self._options.report_interval_s
        report_at = time.monotonic() + interval_s
        while not self._ended:
            left_s = max(0.0, report_at - time.monotonic()) if interval_s else None
            self._server.step(left_s)
            if interval_s and time.monotonic() >= report_at:
                report_at = time.monotonic() + interval_s
                print(json.dumps(self._machine.report()), flush=True)

    def _close(self) -> None:
        if self._end_reason:
            self._emit("SHUTDOWN", {"guest": False, "reason": self._end_reason})
        self._migration.close()
        self._machine.close()
        self._server.flush(FLUSH_S)
        self._server.close()

    def _emit(self, name: str, data: dict[str, object]) -> None:
        self._server.emit(name, data)

    def _on_ready(self, failure: str | None) -> None:
        if failure is None:
            self._server.open()
        else:
            self._failure = failure
            self._end("")

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._end("host-signal")

    def _end(self, reason: str) -> None:
        self._end_reason = reason
        self._machine.abandon()
        self._ended = True
        self._server.wake()


def main(arguments: list[str]) -> int:
    """The command line: one argument, the options as JSON."""
    if len(arguments) != 1:
        print("guest: give the options as one argument of JSON", file=sys.stderr)
        return 2
    try:
        options = GuestOptions.from_json(arguments[0])
    except GuestError as error:
        print(f"guest: {error}", file=sys.stderr)
        return 2
    try:
        run(options)
    except (GuestError, OSError) as error:
        print(f"guest: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
