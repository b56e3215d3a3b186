"""The options of `vfio-ferry receive`, and what the link makes of them."""

from dataclasses import dataclass

from ferry.config import endpoint, option, port, seconds, socket_path, window
from ferry.errors import (
    ConfigError,
)
from ferry.metrics import HELP as METRICS
from ferry.metrics import PORT_HELP as METRICS_PORT
from ferry.migration.phases import BREAK_AT_CHOICES
from ferry.secret_file import AUTHORIZED_HELP, HELP, IDENTITY_HELP, INSECURE, Trust
from transport.receiver import ReceiverOptions

_LINK = ReceiverOptions()
MAX_WATCH_S = 10


def watch_seconds(text: str) -> int:
    """At most half of what the gateways count, less what is between them and us: a device that is
    asked at the end has as long again."""
    if not text.isdecimal() or int(text) > MAX_WATCH_S:
        raise ValueError(f"whole seconds, at most {MAX_WATCH_S}")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `vfio-ferry receive` is told, by flags or by a file."""

    gateway: tuple[str, ...] = option(
        "control socket of a device's gateway; once for each device, in the sender's order",
        (),
        parse=socket_path,
        repeat=True,
    )
    listen: str = option("where to listen: tcp://HOST:PORT or ipc://PATH", parse=endpoint)
    qmp: str = option(
        "QMP socket of the VMM that waits for its guest (-incoming defer)", parse=socket_path
    )
    profile: tuple[str, ...] = option(
        "a device profile, or a folder of them, beside the built-in ones", (), repeat=True
    )
    secret: str | None = option(HELP, None)
    identity: str | None = option(IDENTITY_HELP, None)
    authorized: str | None = option(AUTHORIZED_HELP, None)
    insecure: bool = option(INSECURE, False)
    vouch_one_vm: bool = option(
        "you vouch that --gateway and --qmp are of one VM, where nothing on this host can prove it",
        False,
    )
    watch_device: int = option(
        "seconds to look whether the devices work, once the guest runs here; 0: not at all",
        3,
        parse=watch_seconds,
    )
    peer_timeout: float = option(
        "seconds of silence until the peer is lost", _LINK.peer_timeout_s, parse=seconds
    )
    resume_window: float = option(
        "seconds to wait for a lost link to be made anew, as far as the sender asks for it",
        _LINK.resume_window_s,
        parse=window,
    )
    wait: float | None = option("seconds to wait for a sender", None, parse=seconds)
    keep: bool = option(
        "stay for the next guest: wait for the next VMM at --qmp, and listen again", False
    )
    metrics_file: str | None = option(METRICS, None)
    metrics_port: int | None = option(METRICS_PORT, None, parse=port)
    json: bool = option("print events as JSON lines", False)
    break_at: str = option(
        "failure drill: stop this process (SIGSTOP) on entering this phase",
        "",
        choices=BREAK_AT_CHOICES,
    )


def receiver_options(options: Options) -> ReceiverOptions:
    """The link's options as the user wants them. Raises `ConfigError` for what cannot be, and what
    `Trust` does."""
    trust = Trust(options.secret, options.identity, options.authorized, options.insecure)
    secret = trust.of_receiver(options.listen)
    try:
        return ReceiverOptions(
            peer_timeout_s=options.peer_timeout,
            resume_window_s=options.resume_window,
            secret=secret,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
