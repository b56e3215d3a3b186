"""The gateway's process: signals, descriptors, and the event loop until the end.

Started by the composition room with its options; imports neither trio nor numpy nor numba, for it
has to be there at once and stay small for as long as the VM lives.
"""

import gc
import resource
import signal
from contextlib import suppress
from dataclasses import replace

from sync.gateway.engine.loop import Gateway, GatewayOptions
from sync.gateway.log import Log
from sync.service_manager import heartbeat, notify, passed_sockets

__all__ = ["GatewayOptions", "run"]


def run(options: GatewayOptions) -> None:
    """Runs a gateway until SIGTERM, SIGINT or SIGHUP, then removes its sockets and returns.

    A service manager's listening sockets are used where their paths fit, and it hears that the
    gateway is ready and alive (`sync.service_manager`).

    Events go to stdout as JSON lines with `options.json`, else to stderr as text. Raises
    `SocketInUse` or OSError if it cannot listen.
    """
    _allow_descriptors()
    options = replace(options, passed=passed_sockets(), heartbeat=heartbeat())
    log = Log(1 if options.json else 2, as_json=options.json)
    gateway = Gateway(options, log)
    before = {
        number: signal.signal(number, lambda *_: gateway.stop())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    }
    # What is loaded by now stays: the collector need not look at it again on the data path.
    gc.freeze()
    try:
        notify("READY=1\nSTATUS=listening")
        gateway.run()
    finally:
        notify("STOPPING=1")
        for number, handler in before.items():
            signal.signal(number, handler)
        log("ended")


def _allow_descriptors() -> None:
    """A memory map and a table of interrupts may bring thousands of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
