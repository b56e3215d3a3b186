"""`vfio-ferry send`: its options, and what it tells at the end. `ferry.source` does the work."""

from dataclasses import dataclass
from typing import Literal

import trio

from ferry.config import endpoint, log_page, natural, option, positive, seconds, size
from ferry.errors import ConfigError, Exit
from ferry.progress import Reporter
from ferry.secret import HELP
from ferry.side import Shell, break_at_choices, conclude, first_error
from ferry.source import Source
from ferry.source_link import sender_options
from sync.handover import Event
from sync.handover_states import State
from transport.codec import Codec

ADVICE = {
    State.ABORTED: "The guest continues on this host with its device in passthrough.",
    State.IN_DOUBT: (
        "The commit was sent and not answered, so this side neither resumes nor claims success. "
        "Run `vfio-ferry resolve --role target` on the other host; it says what to do here."
    ),
    State.BROKEN: (
        "The guest belongs to this host, but it or its device could not be set going again: run "
        "`vfio-ferry resolve --role source`."
    ),
    State.OWNER_FAILED: (
        "The target owns the guest but could not start it: run `vfio-ferry resolve --role target` "
        "there. The guest must not be resumed here."
    ),
}


def codec_name(text: str) -> str:
    """What names a codec, or `auto`."""
    if text != "auto":
        try:
            Codec.parse(text)
        except ValueError as error:
            raise ValueError(f"auto, {error}") from None
    return text


def bandwidth(text: str) -> int:
    """Bytes a second, as a size that is not 0."""
    if not size(text):
        raise ValueError("a size a second like 100M, more than 0")
    return size(text)


@dataclass(frozen=True, kw_only=True)
class Options:
    gateway: tuple[str, ...] = option(
        "control socket of a device's gateway; once for each device", (), repeat=True
    )
    to: str = option("where `receive` listens: tcp://HOST:PORT or ipc://PATH", parse=endpoint)
    qmp: str = option("QMP socket of the VMM")
    downtime_limit: int = option("how long the guest may stand still, in ms", 300, parse=positive)
    threshold: int | None = option(
        "switch over at this many dirty pages, whatever the downtime", None, parse=natural
    )
    max_rounds: int = option("rounds before the stall policy decides", 30, parse=positive)
    timeout: float = option("seconds that the rounds may take", 3600.0, parse=seconds)
    on_stall: Literal["switch", "abort"] = option(
        "when the dirty set no longer shrinks: switch at the best moment, or abort",
        "switch",
        choices=("switch", "abort"),
    )
    registers: Literal["auto", "v2", "replay"] = option(
        "how register state moves", "auto", choices=("auto", "v2", "replay")
    )
    dirty: Literal["auto", "logging", "message", "scan"] = option(
        "how dirty pages are found", "auto", choices=("auto", "logging", "message", "scan")
    )
    log_page_size: int = option("page size asked of a device that logs", 4096, parse=log_page)
    profile: tuple[str, ...] = option(
        "a device profile, or a folder of them, beside the built-in ones", (), repeat=True
    )
    verify: str = option(
        "what is compared by digest before the commit: all pages, or those touched",
        "touched",
        choices=("touched", "all"),
    )
    lanes: int = option("connections for pages", 2, parse=positive)
    frame_size: int = option("bytes of a frame of pages", 5 << 19, parse=size)
    codec: str = option(
        "how pages are compressed: auto, none, delta, lz4 or zstd:LEVEL", "auto", parse=codec_name
    )
    cache: int = option("bytes kept to compute deltas from", 64 << 20, parse=size)
    bandwidth: int | None = option(
        "limit in bytes per second, for everything", None, parse=bandwidth
    )
    secret: str | None = option(HELP, None)
    connect_timeout: float = option("seconds to find the receiver", 5.0, parse=seconds)
    peer_timeout: float = option("seconds of silence until the peer is lost", 5.0, parse=seconds)
    quit_source: bool = option("end the source's VMM once the target owns the guest", False)
    check: bool = option(
        "only find out whether it would work, from a receiver that listens; nothing is moved", False
    )
    json: bool = option("print events as JSON lines", False)
    break_at: str = option(
        "failure drill: stop this process (SIGSTOP) on entering this phase",
        "",
        choices=("", *break_at_choices()),
    )


def run(options: Options) -> int:
    """Runs one migration from this host; returns the exit code."""
    return trio.run(_main, options)


async def _main(options: Options) -> Exit:
    if not options.gateway:
        raise ConfigError("--gateway is missing; see: vfio-ferry send --help")
    sender_options(options)  # what cannot be is refused before anything is begun
    reporter = Reporter("send", as_json=options.json)
    try:
        async with trio.open_nursery() as nursery:
            source = Source(options, reporter, nursery)
            await nursery.start(Shell(reporter, options.break_at).watch_signals, source.runner)
            nursery.start_soon(source.kernels.load)
            state = await source.runner.run(Event.START)
            await source.close(state)
            nursery.cancel_scope.cancel()
    except* Exception as group:
        raise first_error(group) from group
    if state is State.COMMITTED:
        reporter.event("report", text=source.report.text(), **source.report.values())
    if state is State.CHECKED:
        reporter.event("message", text="It would work; nothing was touched.")
    return conclude(reporter, state, source.runner, ADVICE)
