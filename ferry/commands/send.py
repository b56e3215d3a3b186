"""`vfio-ferry send`: one migration from this host, and what is told at its end."""

from contextlib import AsyncExitStack
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import trio

from ferry.errors import ConfigError, Exit
from ferry.metrics import MigrationMetrics
from ferry.migration.conclusion import conclude
from ferry.migration.control import (
    Steering,
    changed,
    control_socket,
    settings,
    settings_text,
)
from ferry.migration.device_watch import DeviceState, Verdict
from ferry.migration.kernels import make_kernels_ready
from ferry.migration.report import Report
from ferry.migration.send_options import Options, sender_options
from ferry.migration.source import Source
from ferry.migration.stop_request import StopRequest, stopped_by_signals
from ferry.nurseries import alongside, first_error
from ferry.private import check_folders
from ferry.progress import Reporter
from sync.handover.machine import Event
from sync.handover.states import HandoverState

UNTOUCHED = "Nothing was touched."
ADVICE = {
    HandoverState.ABORTED: "The guest continues on this host with its device in passthrough.",
    HandoverState.IN_DOUBT: (
        "The commit was sent and not answered, so this side neither resumes nor claims success. "
        "Run `vfio-ferry resolve --session {session}` on the other host; it says what to do here."
    ),
    HandoverState.BROKEN: (
        "The guest belongs to this host, but it or its device could not be set going again: run "
        "`vfio-ferry resolve --session {session}` here."
    ),
    HandoverState.OWNER_FAILED: (
        "The target owns the guest but could not start it: run "
        "`vfio-ferry resolve --session {session}` there. The guest must not be resumed here."
    ),
}


def run(options: Options) -> int:
    """Runs one migration from this host; returns the exit code."""
    reporter = Reporter("send", as_json=options.json)
    if options.metrics_file or options.metrics_port:
        metrics = MigrationMetrics("send", options.metrics_file, options.metrics_port)
        reporter.observe(metrics.take)
    return trio.run(stopped_by_signals, partial(send, options, reporter, own_process=True))


async def send(
    options: Options,
    reporter: Reporter,
    stop: StopRequest | None = None,
    *,
    own_process: bool = False,
) -> Exit:
    """Runs one migration from this host to its end, or until `stop` asks for one before the commit.
    Any number of them may run in one process; `own_process` says that this one does nothing else,
    so a gateway may end it if it hangs.

    Cancelled, it does what the end of its process would do: it closes every descriptor and
    connection, tells the peer nothing and restores nothing. The gateways then do what they do when
    a `send` was killed. Raises what `exit_code_of` knows.
    """
    if not options.gateway:
        raise ConfigError("--gateway is missing; see: vfio-ferry send --help")
    check_folders(options.gateway)
    sender_options(options)  # what cannot be is refused before anything is begun
    stop = stop or StopRequest()
    try:
        async with alongside(stop.wait_and_raise):
            await make_kernels_ready(reporter)
        async with AsyncExitStack() as held, trio.open_nursery() as nursery:
            source = Source(options, reporter, nursery, held, own_process=own_process)
            nursery.start_soon(stop.pass_to, source.runner)
            async with control_socket(options.control_socket, _steering(source, stop, reporter)):
                state = await source.runner.run(Event.START)
            nursery.cancel_scope.cancel()
    except* Exception as group:
        raise first_error(group) from group
    if state is HandoverState.CHECKED:
        reporter.event("message", text="It would work; nothing was touched.")
    if state is HandoverState.COMMITTED:
        return succeed(options, reporter, source.report, source.watched, vmm_ended=source.vmm_ended)
    advice = {state: text.format(session=source.session) for state, text in ADVICE.items()}
    if not source.touched:
        advice[HandoverState.ABORTED] = UNTOUCHED
    return conclude(reporter, state, source.runner, advice)


def _steering(source: Source, stop: StopRequest, reporter: Reporter) -> Steering:
    def status() -> dict[str, Any]:
        return {
            **reporter.last.get("phase", {"phase": "idle"}),
            "session": source.report.session,
            "progress": reporter.last.get("progress"),
            "settings": settings(source.options),
        }

    def change(wanted: dict[str, Any]) -> dict[str, Any]:
        source.change(changed(source.options, wanted))
        now = settings(source.options)
        reporter.event("message", text=f"limits changed: {settings_text(now)}")
        return now

    return Steering(status, partial(stop.ask, "cancelled by `vfio-ferry cancel`"), change)


def succeed(
    options: Options, reporter: Reporter, report: Report, watched: Verdict, *, vmm_ended: bool
) -> Exit:
    """Says where the guest runs now, whether it stood still for longer than it may, and whether its
    devices work there."""
    where = urlsplit(options.to).hostname or f"the other side of {options.to}"
    rest = "has been ended" if vmm_ended else "may be ended"
    text = f"The guest runs on {where}; the VMM here {rest}."
    over = report.downtime_over_limit
    if over:
        text += (
            f" It stood still for {report.downtime_total_ms:.0f} ms, which is more than "
            f"--downtime-limit allows ({report.downtime_limit_ms:.0f} ms)."
        )
    if report.repairs_unexpected:
        text += (
            f" {report.verification['repaired_pages']} pages had to be repaired after the VMM "
            "there had loaded its copy, where none are expected: all are equal, but something "
            "beside this migration writes to guest memory, or pages were missed; please report it."
        )
    text += watched.sentence("there")
    code = Exit.SLOW if over and options.strict_downtime else Exit.OK
    if watched.state is DeviceState.SILENT:
        code = Exit.DEVICE_SILENT
    reporter.event(
        "success",
        text=text,
        session=report.session,
        duration_s=report.duration_s,
        downtime_total_ms=report.downtime_total_ms,
        downtime_limit_ms=report.downtime_limit_ms,
        downtime_over_limit=over,
        devices=watched.state.word,
        exit_code=int(code),
    )
    return code
