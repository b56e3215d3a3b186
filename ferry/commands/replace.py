"""`vfio-ferry replace`: a running guest's device is changed to another process on the same host.

All of it is done by the gateway, which sees it to its end if this process dies: before the switch
the new device is dropped with it, after that the switch is made, or undone.
"""

import os
import signal
from dataclasses import dataclass
from enum import StrEnum

import trio

from ferry.config import option, socket_path
from ferry.errors import ConfigError, Exit
from ferry.progress import Reporter
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole


class Phase(StrEnum):
    PREPARING = "preparing"
    PREPARED = "prepared"
    SWITCHING = "switching"


MEANING = {
    Phase.PREPARING: "the new device is compared with the guest's, and reset; the guest's works on",
    Phase.PREPARED: "the new device is ready",
    Phase.SWITCHING: "the guest's accesses wait while the state goes over",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    gateway: str | None = option("control socket of the device's gateway", None, parse=socket_path)
    device: str | None = option(
        "where the new device listens, another process that serves the same: the old one serves the"
        " guest until it is ready",
        None,
        parse=socket_path,
    )
    check: bool = option("say whether it would work, and change nothing", False)
    break_at: str = option(
        "stop this process (SIGSTOP) when it comes to this phase, for failure drills",
        "",
        choices=("", *Phase),
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    if not options.gateway or not options.device:
        raise ConfigError("--gateway and --device are needed; see: vfio-ferry replace --help")
    return trio.run(
        _replace,
        options,
        options.gateway,
        options.device,
        Reporter("replace", as_json=options.json),
    )


async def _replace(options: Options, gateway_path: str, device_path: str, out: Reporter) -> Exit:
    def enter(phase: Phase) -> None:
        out.event("phase", phase=phase.value, detail=MEANING[phase])
        if phase.value == options.break_at:
            os.kill(os.getpid(), signal.SIGSTOP)

    async with await GatewayClient.connect(gateway_path, role=ClientRole.SOURCE) as gateway:
        enter(Phase.PREPARING)
        ready = await gateway.prepare_device(device_path)
        by = "its own state" if ready.native else "what its profile knows"
        enter(Phase.PREPARED)
        if options.check:
            out.event("message", text=f"it would work, by {by}")
            return Exit.OK
        enter(Phase.SWITCHING)
        with trio.CancelScope(shield=True):
            done = await gateway.switch_device()
            option = (await gateway.status()).device_option
    text = (
        f"the guest has the device at {device_path}, moved by {by}; its accesses waited for "
        f"{done.held_ms:.0f} ms. The old device can be ended"
    )
    if option != device_path:
        text += (
            f". The gateway's --device is still {option}: change it to {device_path} before another"
            " gateway is started"
        )
    out.event(
        "replaced",
        text=text,
        device=device_path,
        native=done.native,
        held_ms=done.held_ms,
    )
    return Exit.OK
