"""The gateway's process: signals, descriptors, and the event loop until the end.

Started by the composition room with its options; imports neither trio nor numpy nor numba, for it
has to be there at once and stay small for as long as the VM lives.
"""

import gc
import os
import resource
import signal
from contextlib import suppress
from dataclasses import replace

from sync.gateway.engine.loop import Gateway, GatewayOptions
from sync.gateway.engine.succession import Predecessor, own_command, predecessor
from sync.gateway.log import Log
from sync.service_manager import heartbeat, notify, passed_sockets

__all__ = ["GatewayOptions", "run"]

REFUSED = 3
"""Exit code of a process that cannot take a gateway's place, beside the word that it has given."""


def run(options: GatewayOptions) -> None:
    """Runs a gateway until SIGTERM, SIGINT or SIGHUP, then removes its sockets and returns; or
    until another process has taken its place, which SIGUSR2 asks for.

    A service manager's listening sockets are used where their paths fit, and it hears that the
    gateway is ready and alive, and which process it is (`sync.service_manager`).

    Events go to stdout as JSON lines with `options.json`, else to stderr as text. Raises
    `SocketInUse` or OSError if it cannot listen.
    """
    _allow_descriptors()
    options = replace(
        options, passed=passed_sockets(), heartbeat=heartbeat(), command=own_command()
    )
    log = Log(1 if options.json else 2, as_json=options.json)
    older = predecessor()
    gateway = Gateway(options, log) if older is None else _succeed(older, options, log)
    before = {
        number: signal.signal(number, lambda *_: gateway.stop())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    }
    before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, lambda *_: gateway.upgrade())
    # What is loaded by now stays: the collector need not look at it again on the data path.
    gc.freeze()
    try:
        if older is not None:
            older.ready()
            gateway.answer_for()
            older.running()
            gateway.take_over()
        notify("READY=1\nSTATUS=listening")
        gateway.run()
    finally:
        if gateway.handed_on:
            notify(f"MAINPID={gateway.handed_on}")
        else:
            notify("STOPPING=1")
        for number, handler in before.items():
            signal.signal(number, handler)
        log("ended")


def _succeed(older: Predecessor, options: GatewayOptions, log: Log) -> Gateway:
    """The gateway in the place of another process's, which goes on if this cannot be."""
    try:
        return Gateway(options, log, older.inherit())
    except Exception as error:
        with suppress(OSError):
            older.refuse(f"{error}" or type(error).__name__)
        # Nothing of what was handed on may be closed in an orderly way: it is not ours.
        os._exit(REFUSED)


def _allow_descriptors() -> None:
    """A memory map and a table of interrupts may bring thousands of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
