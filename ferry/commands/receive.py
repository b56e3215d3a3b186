"""`vfio-ferry receive`: the target's side of one migration, and of the checks before it.

Owns the order of things on the target. Nothing here starts the guest before the commit has come
and the first gateway's ownership record says so.
"""

from urllib.parse import urlsplit

import trio

from ferry.errors import (
    ConfigError,
    Exit,
    Interrupted,
)
from ferry.migration.conclusion import Shell, conclude
from ferry.migration.receive_options import Options, receiver_options
from ferry.migration.target import Target, _reason
from ferry.nurseries import first_error
from ferry.progress import Reporter
from sync.handover.machine import Event
from sync.handover.states import State
from sync.vmm.driver import Vmm
from transport.receiver import ReceiverOptions, open_receiver

ADVICE = {
    State.ABORTED: (
        "This side has fenced the session and will never start the guest; the source keeps it. "
        "Restart the target's VMM before the next attempt."
    ),
    State.IN_DOUBT: (
        "Whether this side owns the guest could not be established: run "
        "`vfio-ferry resolve --role target` when the gateway answers again."
    ),
    State.BROKEN: (
        "This side never took the guest, but its gateway is not in order: restart the gateway "
        "and the VMM here before the next attempt."
    ),
    State.OWNER_FAILED: (
        "This side owns the guest and could not start it: run `vfio-ferry resolve --role target`."
    ),
}


def run(options: Options) -> int:
    """Waits for one migration to this host; returns the exit code."""
    return trio.run(_main, options)


async def _main(options: Options) -> Exit:
    if not options.gateway:
        raise ConfigError("--gateway is missing; see: vfio-ferry receive --help")
    link_options = receiver_options(options)
    reporter = Reporter("receive", as_json=options.json)
    url = options.listen
    if link_options.secret is None and not _is_of_this_host(url):
        reporter.event(
            "message",
            text="Without --secret, whoever reaches this address first is taken for the sender, "
            "and the guest's memory crosses the network as it is.",
        )
    try:
        async with await Vmm.connect(options.qmp) as vmm:
            while True:
                url, target, state = await _receive(options, link_options, reporter, vmm, url)
                error = target.runner.first_error
                if not target.only_check or isinstance(error, Interrupted):
                    break
                outcome = "it would work" if state is State.CHECKED else f"no: {_reason(error)}"
                reporter.event("checked", outcome=outcome, state=state.value)
    except* Exception as group:
        raise first_error(group) from group
    return conclude(reporter, state, target.runner, ADVICE)


def _is_of_this_host(url: str) -> bool:
    host = urlsplit(url).hostname
    return host is None or host in ("localhost", "::1") or host.startswith("127.")


async def _receive(
    options: Options, link_options: ReceiverOptions, reporter: Reporter, vmm: Vmm, url: str
) -> tuple[str, Target, State]:
    """One sender, who asks for a migration or for a check. Returns where it was listened."""
    async with open_receiver(url, link_options) as link, trio.open_nursery() as nursery:
        await vmm.check_target()
        target = Target(options, reporter, nursery, link, vmm)
        await nursery.start(Shell(reporter, options.break_at).watch_signals, target.runner)
        nursery.start_soon(target.listen)
        nursery.start_soon(target.kernels.load)
        reporter.event("listening", url=link.url)
        state = await target.runner.run(Event.START)
        await target.close()
        nursery.cancel_scope.cancel()
    return link.url, target, state
