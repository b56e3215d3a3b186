"""`vfio-ferry resolve`: settles who owns a guest after `send` or `receive` could not finish.

The ownership records of the gateways are the truth; this reads them and does the one thing that
they allow. It asks the target first: the first gateway there either holds the commit, and then
the guest is started, or it is fenced, and then the source may take the guest back.
"""

from dataclasses import dataclass

import trio

from ferry.config import option, socket_path
from ferry.errors import ConfigError, Exit
from ferry.progress import Reporter
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.info import GatewayInfo
from sync.gateway.engine.custody import ClientRole
from sync.vmm.driver import Vmm
from sync.vmm.recover import recover_source

DEADLINE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Options:
    gateway: tuple[str, ...] = option(
        "control socket of a device's gateway, in the order given to send or receive",
        (),
        parse=socket_path,
        repeat=True,
    )
    qmp: str = option("QMP socket of the VMM on this host", parse=socket_path)
    role: str = option("which side this host was", choices=("source", "target"))
    peer: str = option(
        "source only: what `resolve --role target` said on the other host",
        "unknown",
        choices=("unknown", "fenced", "committed"),
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    if not options.gateway:
        raise ConfigError("--gateway is missing; see: vfio-ferry resolve --help")
    reporter = Reporter("resolve", as_json=options.json)
    settle = _settle_source if options.role == "source" else _settle_target
    return trio.run(settle, options, reporter)


async def _status(path: str) -> GatewayInfo:
    async with await GatewayClient.connect(path) as gateway:
        return await gateway.status()


async def _settle_target(options: Options, reporter: Reporter) -> Exit:
    record = await _status(options.gateway[0])
    async with await Vmm.connect(options.qmp) as vmm:
        # A gateway that was started anew has lost its record; a guest that runs is proof enough.
        recorded = record.owner == "owned" and record.session != ""
        if not recorded and await vmm.run_state() != "running":
            for path in options.gateway:
                await _fence(path)
            await vmm.quit()
            reporter.event(
                "message",
                text="fenced: this side does not hold the commit and will never start the guest; "
                "the VMM that waited for it was ended. "
                "On the source: vfio-ferry resolve --role source --peer fenced",
                outcome="fenced",
            )
            return Exit.OK
        await _complete(options.gateway, record.session)
        if await vmm.run_state() != "running":
            await vmm.resume()
    reporter.event(
        "message",
        text="committed: this side owns the guest and it runs here. "
        "On the source: vfio-ferry resolve --role source --peer committed",
        outcome="committed",
    )
    return Exit.OK


async def _complete(paths: tuple[str, ...], session: str) -> None:
    """Starts the devices that the commit reached but that nobody was left to start."""
    for path in paths:
        if (await _status(path)).state == "standby":
            async with await GatewayClient.connect(
                path, role=ClientRole.TARGET, session=session
            ) as gateway:
                await gateway.start()


async def _fence(path: str) -> None:
    info = await _status(path)
    # Owned without the first gateway's record: it stays in standby, and nobody will start it.
    if info.state == "standby" and info.owner != "owned":
        async with await GatewayClient.connect(
            path, role=ClientRole.TARGET, session=info.session
        ) as gateway:
            await gateway.fence(info.session)
            await gateway.abandon()


async def _settle_source(options: Options, reporter: Reporter) -> Exit:
    released = [path for path in options.gateway if (await _status(path)).owner == "released"]
    async with await Vmm.connect(options.qmp) as vmm:
        # A gateway that was started anew has lost its record; but no guest is released before its
        # VMM has sent everything.
        let_go = released or await vmm.run_state() == "postmigrate"
    if let_go and options.peer == "unknown":
        reporter.event(
            "error",
            message="this side has let go of the guest and does not know whether the target took "
            "it: run `vfio-ferry resolve --role target` there, then this again with --peer",
            outcome="in-doubt",
        )
        return Exit.IN_DOUBT
    if let_go and options.peer == "committed":
        reporter.event(
            "message",
            text="the target owns the guest; the VMM here may be ended",
            outcome="released",
        )
        return Exit.OK
    for path in released:
        session = (await _status(path)).session
        async with await GatewayClient.connect(
            path, role=ClientRole.SOURCE, session=session
        ) as gateway:
            await gateway.reclaim(session)
            await gateway.passthrough()
    done = await trio.to_thread.run_sync(recover_source, options.qmp, DEADLINE_S)
    reporter.event(
        "message",
        text=f"this side owns the guest and it runs here ({done})",
        outcome="owned",
    )
    return Exit.OK
