"""`vfio-ferry receive`: the target's side of one migration, and of the checks before it.

Owns the order of things on the target. Nothing here starts the guest before the commit has come
and the first gateway's ownership record says so.
"""

from contextlib import AsyncExitStack
from functools import partial
from urllib.parse import urlsplit

import trio

from ferry.errors import (
    ConfigError,
    Exit,
    Interrupted,
)
from ferry.migration.conclusion import conclude
from ferry.migration.kernels import make_kernels_ready
from ferry.migration.receive_options import Options, receiver_options
from ferry.migration.stop_request import StopRequest, stopped_by_signals
from ferry.migration.target import Target
from ferry.nurseries import alongside, first_error
from ferry.progress import Reporter
from sync.handover.machine import Event
from sync.handover.states import HandoverState
from sync.vmm.driver import Vmm
from transport.receiver import ReceiverOptions, open_receiver

ADVICE = {
    HandoverState.ABORTED: (
        "This side has fenced the session and will never start the guest; the source keeps it. "
        "Restart the target's VMM before the next attempt."
    ),
    HandoverState.IN_DOUBT: (
        "Whether this side owns the guest could not be established: run "
        "`vfio-ferry resolve --role target` when the gateway answers again."
    ),
    HandoverState.BROKEN: (
        "This side never took the guest, but its gateway is not in order: restart the gateway "
        "and the VMM here before the next attempt."
    ),
    HandoverState.OWNER_FAILED: (
        "This side owns the guest and could not start it: run `vfio-ferry resolve --role target`."
    ),
}


def run(options: Options) -> int:
    """Waits for one migration to this host; returns the exit code."""
    reporter = Reporter("receive", as_json=options.json)
    return trio.run(stopped_by_signals, partial(receive, options, reporter))


async def receive(options: Options, reporter: Reporter, stop: StopRequest | None = None) -> Exit:
    """Waits for one migration to this host and answers the checks before it, to its end or until
    `stop` asks for one before the commit. Any number of them may run in one process.

    Cancelled, it does what the end of its process would do: it closes every descriptor and
    connection, tells the peer nothing and fences nothing. Raises what `exit_code_of` knows.
    """
    if not options.gateway:
        raise ConfigError("--gateway is missing; see: vfio-ferry receive --help")
    link_options = receiver_options(options)
    stop = stop or StopRequest()
    url = options.listen
    if link_options.secret is None and not _is_of_this_host(url):
        reporter.event(
            "message",
            text="Without --secret, whoever reaches this address first is taken for the sender, "
            "and the guest's memory crosses the network as it is.",
        )
    try:
        async with AsyncExitStack() as held:
            async with alongside(stop.wait_and_raise):
                await make_kernels_ready(reporter)
                vmm = await held.enter_async_context(await Vmm.connect(options.qmp))
            while True:
                url, target, state = await _receive(options, link_options, reporter, stop, vmm, url)
                error = target.runner.first_error
                if not target.only_check or isinstance(error, Interrupted):
                    break
                fits = state is HandoverState.CHECKED
                outcome = "it would work" if fits else f"no: {target.runner.reason}"
                reporter.event("checked", outcome=outcome, state=state.value)
    except* Exception as group:
        raise first_error(group) from group
    return conclude(reporter, state, target.runner, ADVICE)


def _is_of_this_host(url: str) -> bool:
    host = urlsplit(url).hostname
    return host is None or host in ("localhost", "::1") or host.startswith("127.")


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
        state = await target.runner.run(Event.START)
        nursery.cancel_scope.cancel()
    return link.url, target, state
