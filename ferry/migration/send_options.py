"""The options of `vfio-ferry send`, and what the link makes of them."""

from dataclasses import dataclass
from typing import Literal

from ferry.config import (
    endpoint,
    log_page,
    milliseconds,
    natural,
    option,
    port,
    positive,
    rate,
    seconds,
    size,
    socket_path,
    window,
)
from ferry.errors import ConfigError
from ferry.metrics import HELP as METRICS
from ferry.metrics import PORT_HELP as METRICS_PORT
from ferry.migration.phases import BREAK_AT_CHOICES
from ferry.secret_file import AUTHORIZED_HELP, HELP, IDENTITY_HELP, INSECURE, Trust
from sync.convergence import Limits
from sync.memory import PAGE_BYTES
from transport.sender import SenderOptions
from transport.wire.codec import Codec

_ROUNDS = Limits()
_LINK = SenderOptions()


def codec_name(text: str) -> str:
    """The name of a codec, or `auto`. Raises `ValueError` for any other text."""
    if text != "auto":
        try:
            Codec.parse(text)
        except ValueError as error:
            raise ValueError(f"auto, {error}") from None
    return text


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `vfio-ferry send` is told, by flags or by a file."""

    gateway: tuple[str, ...] = option(
        "control socket of a device's gateway; once for each device",
        (),
        parse=socket_path,
        repeat=True,
    )
    to: str = option("where `receive` listens: tcp://HOST:PORT or ipc://PATH", parse=endpoint)
    qmp: str = option("QMP socket of the VMM", parse=socket_path)
    downtime_limit: int = option(
        "how long the guest may stand still, in ms", int(_ROUNDS.downtime_ms), parse=milliseconds
    )
    threshold: int | None = option(
        "switch over at this many dirty pages, whatever the downtime",
        _ROUNDS.threshold_pages,
        parse=natural,
    )
    max_rounds: int = option(
        "rounds before the stall policy decides", _ROUNDS.max_rounds, parse=positive
    )
    timeout: float = option("seconds that the rounds may take", 3600.0, parse=seconds)
    on_stall: Literal["switch", "abort", "throttle"] = option(
        "when the dirty set no longer shrinks: switch at the best moment, abort, or have the VMM "
        "throttle the guest's processors (and then switch)",
        _ROUNDS.on_stall,
        choices=("switch", "abort", "throttle"),
    )
    vmm_stream: Literal["auto", "open", "closed"] = option(
        "how the VMM's own stream goes: opened, so that all pages take the lanes, or as it is",
        "auto",
        choices=("auto", "open", "closed"),
    )
    registers: Literal["auto", "v2", "replay"] = option(
        "how register state moves", "auto", choices=("auto", "v2", "replay")
    )
    dirty: Literal["auto", "logging", "queues", "message", "scan"] = option(
        "how dirty pages are found",
        "auto",
        choices=("auto", "logging", "queues", "message", "scan"),
    )
    log_page_size: int = option("page size asked of a device that logs", PAGE_BYTES, parse=log_page)
    profile: tuple[str, ...] = option(
        "a device profile, or a folder of them, beside the built-in ones", (), repeat=True
    )
    verify: str = option(
        "what is compared by digest before the commit: all pages, or those touched",
        "touched",
        choices=("touched", "all"),
    )
    lanes: int = option("connections for pages", _LINK.lanes, parse=positive)
    frame_size: int = option("bytes of a frame of pages", _LINK.frame_bytes, parse=size)
    codec: str = option(
        "how pages are compressed: auto, none, delta, lz4 or zstd:LEVEL", "auto", parse=codec_name
    )
    cache: int = option("bytes kept to compute deltas from", 64 << 20, parse=size)
    bandwidth: int | None = option(
        "limit for everything that crosses: bytes a second, or bits as in 800Mbit/s",
        _LINK.bandwidth_bytes_per_s,
        parse=rate,
    )
    secret: str | None = option(HELP, None)
    identity: str | None = option(IDENTITY_HELP, None)
    authorized: str | None = option(AUTHORIZED_HELP, None)
    insecure: bool = option(INSECURE, False)
    vouch_one_vm: bool = option(
        "you vouch that --gateway and --qmp are of one VM, where nothing on this host can prove it",
        False,
    )
    connect_timeout: float = option(
        "seconds to find the receiver", _LINK.connect_timeout_s, parse=seconds
    )
    peer_timeout: float = option(
        "seconds of silence until the peer is lost", _LINK.peer_timeout_s, parse=seconds
    )
    resume_window: float = option(
        "seconds to make a lost link anew while the guest runs; 0: not at all",
        _LINK.resume_window_s,
        parse=window,
    )
    control_socket: str | None = option(
        "where status, cancel and set reach it; by default in this user's runtime folder", None
    )
    quit_source: bool = option("end the source's VMM once the target owns the guest", False)
    strict_downtime: bool = option(
        "end with an exit code of its own if the guest stood still for longer than the limit", False
    )
    check: bool = option(
        "only find out whether it would work, from a receiver that listens; nothing is moved", False
    )
    metrics_file: str | None = option(METRICS, None)
    metrics_port: int | None = option(METRICS_PORT, None, parse=port)
    json: bool = option("print events as JSON lines", False)
    break_at: str = option(
        "failure drill: stop this process (SIGSTOP) on entering this phase",
        "",
        choices=BREAK_AT_CHOICES,
    )


def sender_options(options: Options) -> SenderOptions:
    """The link's options as the user wants them. Raises `ConfigError` for what cannot be, and what
    `Trust` does."""
    trust = Trust(options.secret, options.identity, options.authorized, options.insecure)
    secret = trust.of_sender(options.to)
    try:
        return SenderOptions(
            lanes=options.lanes,
            frame_bytes=options.frame_size,
            connect_timeout_s=options.connect_timeout,
            peer_timeout_s=options.peer_timeout,
            resume_window_s=options.resume_window,
            bandwidth_bytes_per_s=options.bandwidth,
            codec=None if options.codec == "auto" else Codec.parse(options.codec),
            secret=secret,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
