"""`vfio-ferry receive`: the target's side of a migration, and of the checks before it.

Owns the order of things on the target. Nothing here starts the guest before the commit has come
and the first gateway's ownership record says so.
"""

from contextlib import AsyncExitStack
from functools import partial

import trio

from ferry.errors import ConfigError, Exit, Interrupted
from ferry.exit_codes import exit_code_of
from ferry.metrics import MigrationMetrics
from ferry.migration.conclusion import conclude
from ferry.migration.device_watch import DeviceState
from ferry.migration.kernels import make_kernels_ready
from ferry.migration.receive_options import Options, receiver_options
from ferry.migration.stop_request import StopRequest, stopped_by_signals
from ferry.migration.target import Target
from ferry.nurseries import alongside, first_error
from ferry.private import check_folders
from ferry.progress import Reporter, bytes_text
from sync.gateway.control.client import GatewayClient
from sync.handover.machine import Event
from sync.handover.states import HandoverState
from sync.service_manager import notify
from sync.vmm.driver import Vmm
from sync.vmm.recover import socket_made
from transport.receiver import ReceiverOptions, open_receiver

FENCED = "This side has fenced the session and will never start the guest."
RESTART = "Restart the target's VMM before the next attempt."
UNTOUCHED = "Nothing here was touched: `vfio-ferry receive` can be started again as it was."
ADVICE = {
    HandoverState.ABORTED: f"{FENCED} {RESTART}",
    HandoverState.IN_DOUBT: (
        "Whether the guest may run here could not be established: run `vfio-ferry resolve` "
        "when the gateway answers again."
    ),
    HandoverState.BROKEN: (
        "This side never took the guest, but its gateway is not in order: restart the gateway "
        "and the VMM here before the next attempt."
    ),
    HandoverState.OWNER_FAILED: (
        "This side owns the guest and could not start it: run `vfio-ferry resolve` here."
    ),
}

REFUSALS = frozenset({Exit.REFUSED, Exit.PEER_PROTOCOL, Exit.PEER_LOST, Exit.PEER_ABORTED})
"""What a sender can bring about by its greeting alone: no reason to stop listening for others."""
GOES_ON = frozenset(Exit) - {Exit.IN_DOUBT, Exit.BROKEN, Exit.OWNER_FAILED, Exit.INTERRUPTED}
"""How a migration may end for `--keep` to wait for the next one."""
NEXT_VMM_S = 1.0
"""How often `--keep` looks for the next VMM."""


def advice_of(target: Target) -> dict[HandoverState, str]:
    """What this side knows: not what became of the source, which may have died in any state."""
    if not target.touched:
        return ADVICE | {HandoverState.ABORTED: UNTOUCHED}
    if not target.proof:
        return ADVICE
    text = (
        f"{FENCED} A source that is in doubt takes it back with `vfio-ferry resolve --verdict "
        f"{target.proof}`. {RESTART}"
    )
    return ADVICE | {HandoverState.ABORTED: text}


def run(options: Options) -> int:
    """Waits for one migration to this host; returns the exit code."""
    reporter = Reporter("receive", as_json=options.json)
    if options.metrics_file or options.metrics_port:
        metrics = MigrationMetrics("receive", options.metrics_file, options.metrics_port)
        reporter.observe(metrics.take)
    return trio.run(stopped_by_signals, partial(receive, options, reporter))


async def receive(options: Options, reporter: Reporter, stop: StopRequest | None = None) -> Exit:
    """Waits for a migration to this host and answers the checks before it, to its end or until
    `stop` asks for one before the commit; with `--keep` then for the next. Any number of them may
    run in one process.

    Cancelled, it does what the end of its process would do: it closes every descriptor and
    connection, tells the peer nothing and fences nothing. Raises what `exit_code_of` knows.
    """
    if not options.gateway:
        raise ConfigError("--gateway is missing; see: vfio-ferry receive --help")
    link_options = receiver_options(options)
    check_folders(options.gateway)
    stop = stop or StopRequest()
    try:
        async with alongside(stop.wait_and_raise):
            await make_kernels_ready(reporter)
            for path in options.gateway:
                await (await GatewayClient.connect(path)).aclose()
        while True:
            vmm_socket = socket_made(options.qmp)
            code = await _receive_guest(options, link_options, reporter, stop)
            if not options.keep or code not in GOES_ON:
                return code
            text = f"waiting for the next VMM at {options.qmp}"
            notify(f"STATUS={text}")
            reporter.event("message", text=text)
            async with alongside(stop.wait_and_raise):
                await wait_for_another(options.qmp, vmm_socket)
    except* Exception as group:
        raise first_error(group) from group


async def wait_for_another(path: str, before: tuple[int, int, int] | None) -> None:
    """Waits until another process than that of `before` (`socket_made`) listens at `path`. It is
    not connected to meanwhile: a VMM serves one client at a time, and its operator may need it."""
    while True:
        if socket_made(path) not in (None, before):
            return
        await trio.sleep(NEXT_VMM_S)


async def _receive_guest(
    options: Options, link_options: ReceiverOptions, reporter: Reporter, stop: StopRequest
) -> Exit:
    """Answers senders until a migration to this host has come to its end."""
    url = options.listen
    async with AsyncExitStack() as held:
        async with alongside(stop.wait_and_raise):
            vmm = await held.enter_async_context(await Vmm.connect(options.qmp))
        while True:
            url, target, state = await _receive(options, link_options, reporter, stop, vmm, url)
            error = target.runner.first_error
            if isinstance(error, Interrupted):
                break
            if target.only_check:
                fits = state is HandoverState.CHECKED
                outcome = "it would work" if fits else f"no: {target.runner.reason}"
                reporter.event("checked", outcome=outcome, state=state.value)
            elif target.touched or error is None or exit_code_of(error) not in REFUSALS:
                break
            else:
                code = exit_code_of(error)
                reason = target.runner.reason
                reporter.event("refused", reason=reason, exit_name=code.name.lower())
    if state is HandoverState.COMMITTED:
        return _code(target)
    return conclude(reporter, state, target.runner, advice_of(target))


def _code(target: Target) -> Exit:
    """What a migration that has brought the guest here ends with."""
    silent = target.watched.state is DeviceState.SILENT
    return Exit.DEVICE_SILENT if silent else Exit.OK


async def _receive(
    options: Options,
    link_options: ReceiverOptions,
    reporter: Reporter,
    stop: StopRequest,
    vmm: Vmm,
    url: str,
) -> tuple[str, Target, HandoverState]:
    """Serves one sender, which asks for a migration or for a check. Returns the address that it
    listened at, and how it ended."""
    async with (
        AsyncExitStack() as held,
        open_receiver(url, link_options) as link,
        trio.open_nursery() as nursery,
    ):
        await vmm.check_target()
        target = Target(options, reporter, nursery, held, link, vmm)
        nursery.start_soon(stop.pass_to, target.runner)
        nursery.start_soon(target.wait_hello)
        reporter.event("listening", url=link.url)
        notify(f"READY=1\nSTATUS=listening at {link.url}")
        state = await target.runner.run(Event.START)
        if state is HandoverState.COMMITTED:
            await target.watch_devices()
        nursery.cancel_scope.cancel()
        if state is HandoverState.COMMITTED:
            report = target.arrival.values(link.statistics())
            text = (
                f"The guest runs here; the VMM at the source may be ended. It took "
                f"{report['duration_s']:.1f} s, {report['pages']} pages in "
                f"{bytes_text(report['wire_bytes']['pages'])}, "
                f"{bytes_text(report['wire_bytes']['vmm_stream'])} of the VMM's own."
            )
            reporter.event(
                "success",
                text=text + target.watched.sentence("here"),
                **report,
                devices=target.watched.state.word,
                exit_code=int(_code(target)),
            )
    return link.url, target, state
