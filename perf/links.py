"""Links between two processes: the loopback, UNIX sockets, and shaped ones of our own making.

A shaped link is a veth(4) pair between two network namespaces in a user namespace of their own, so
it takes no privilege where the system lets its users make such namespaces, and the host's network
is out of reach. The namespaces have no names and no process: they are open descriptors of the
harness, so the kernel takes them away when it ends, however it ends. Each end sends at the link's
rate (token bucket, tc-tbf(8)), and after a delay if one is asked for (tc-netem(8), which not every
kernel has).
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from perf.errors import BenchmarkFailed, BenchUsageError, NeedMissing

SOURCE_ADDRESS = "10.77.0.1"
TARGET_ADDRESS = "10.77.0.2"
DEVICE = "veth0"
BURST_S = 0.0005
"""Time's worth of bytes that a bucket holds: above a timer's slack, below what TCP would notice."""
MIN_BURST_BYTES = 128 << 10
"""More than the largest segment that TCP hands to the device, or it would be cut in pieces here."""
QUEUE_S = 0.02
"""Time's worth of bytes that wait in front of the bucket before they are dropped."""
TOOL_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Link:
    """How a source and a target reach each other."""

    name: str
    bits_per_s: int | None = None
    """The rate in each direction; None: not limited."""
    delay_s: float = 0.0
    """The delay in one direction."""
    source_prefix: tuple[str, ...] = ()
    """The source's command is put behind these words."""
    target_prefix: tuple[str, ...] = ()
    target_address: str = "127.0.0.1"
    """Where the target listens."""
    sockets: Path | None = None
    """The folder of UNIX sockets that the target listens at instead."""

    def url(self, name: str) -> str:
        """For ZeroMQ to bind: a free port, or a socket of this name."""
        return f"ipc://{self.sockets / name}" if self.sockets else f"tcp://{self.target_address}:*"


TCP = Link("tcp")
"""The loopback."""


@contextmanager
def open_link(text: str) -> Iterator[Link]:
    """The link that `text` names, for the block: `tcp` over the loopback, `ipc` (UNIX sockets), or
    one of so many Mbit/s, `1000`, with a delay one way if it is given, `1000@5ms`.

    Raises `BenchUsageError`, and `NeedMissing` as `shaped_link`.
    """
    if text == "tcp":
        yield TCP
    elif text == "ipc":
        with tempfile.TemporaryDirectory(prefix="ferry-bench-") as folder:
            yield Link("ipc", sockets=Path(folder))
    elif found := re.fullmatch(r"([1-9]\d{0,5})(?:@(\d+(?:\.\d+)?)ms)?", text):
        with shaped_link(int(found[1]) * 10**6, float(found[2] or 0) / 1e3) as link:
            yield link
    else:
        raise BenchUsageError(
            f"there is no link {text!r}; there are tcp, ipc, and Mbit/s, with a delay or without: "
            "1000, 1000@5ms"
        )


@contextmanager
def local_link(text: str) -> Iterator[Link]:
    """`open_link`, for a benchmark whose own process is at one end."""
    if text not in ("tcp", "ipc"):
        raise BenchUsageError(f"link={text}: this benchmark can have tcp and ipc")
    with open_link(text) as link:
        yield link


@contextmanager
def shaped_link(bits_per_s: int | None, delay_s: float = 0.0) -> Iterator[Link]:
    """A link of that rate in each direction and of that delay one way, for the block.

    None: as fast as the machine moves it. Raises `NeedMissing` where namespaces, or a queueing
    discipline, are not to be had.
    """
    with ExitStack() as stack:
        user, source = _namespaces(stack, ("unshare", "--user", "--map-root-user", "--net"))
        inside = _enter(user, source)
        _, target = _namespaces(stack, (*inside, "unshare", "--net"))
        # Inside, the harness's descriptors cannot be looked up any more, so this one is handed on.
        _run(
            *(*inside, "ip", "link", "add", "name", DEVICE, "type", "veth"),
            *("peer", "name", DEVICE, "netns", f"/proc/self/fd/{target}"),
            descriptor=target,
        )
        for namespace, address in ((source, SOURCE_ADDRESS), (target, TARGET_ADDRESS)):
            prefix = _enter(user, namespace)
            _run(*prefix, "ip", "link", "set", "lo", "up")
            _run(*prefix, "ip", "address", "add", f"{address}/24", "dev", DEVICE)
            _run(*prefix, "ip", "link", "set", DEVICE, "up")
            for discipline in _disciplines(bits_per_s, delay_s):
                _run(*prefix, "tc", "qdisc", "add", "dev", DEVICE, *discipline)
        yield Link(
            name=_name(bits_per_s, delay_s),
            bits_per_s=bits_per_s,
            delay_s=delay_s,
            source_prefix=inside,
            target_prefix=_enter(user, target),
            target_address=TARGET_ADDRESS,
        )


def missing() -> str | None:
    """What stands in the way of shaped links, in words; None if nothing does."""
    try:
        with shaped_link(10**9):
            return None
    except (NeedMissing, BenchmarkFailed) as error:
        return str(error)


def _name(bits_per_s: int | None, delay_s: float) -> str:
    rate = "unshaped" if bits_per_s is None else f"{bits_per_s / 1e6:g} Mbit/s"
    return f"{rate}, {delay_s * 1e3:g} ms" if delay_s else rate


def _disciplines(bits_per_s: int | None, delay_s: float) -> Iterator[Sequence[str]]:
    """Arguments of `tc qdisc add dev DEVICE`, the outer discipline first."""
    place = ["root", "handle", "1:"]
    if bits_per_s is not None:
        burst = max(MIN_BURST_BYTES, int(bits_per_s / 8 * BURST_S))
        limit = burst + int(bits_per_s / 8 * QUEUE_S)
        rate = ["rate", f"{bits_per_s}bit", "burst", str(burst), "limit", str(limit)]
        yield [*place, "tbf", *rate]
        place = ["parent", "1:", "handle", "2:"]
    if delay_s:
        yield [*place, "netem", "delay", f"{delay_s * 1e6:.0f}us", "limit", "100000"]


def _namespaces(stack: ExitStack, command: Sequence[str]) -> tuple[int, int]:
    """User and network namespace that `command` makes, as descriptors closed with `stack`."""
    try:
        maker = subprocess.Popen(
            [*command, "sh", "-c", "echo; read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise NeedMissing(f"no network namespace: {error}") from error
    with maker:
        assert maker.stdout is not None
        assert maker.stderr is not None
        if not maker.stdout.readline():
            raise NeedMissing(f"no network namespace: {maker.stderr.read().decode().strip()}")
        found = [os.open(f"/proc/{maker.pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "net")]
        for descriptor in found:
            stack.callback(os.close, descriptor)
    return found[0], found[1]


def _path(namespace: int) -> str:
    return f"/proc/{os.getpid()}/fd/{namespace}"


def _enter(user: int, network: int) -> tuple[str, ...]:
    """What puts a command into the namespaces."""
    return (
        *("nsenter", f"--user={_path(user)}", f"--net={_path(network)}"),
        *("--preserve-credentials", "--"),
    )


def _run(*command: str, descriptor: int | None = None) -> None:
    handed = () if descriptor is None else (descriptor,)
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=TOOL_DEADLINE_S, pass_fds=handed
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NeedMissing(f"{command[0]}: {error}") from error
    if done.returncode:
        words = " ".join(command[command.index("--") + 1 :] if "--" in command else command)
        raise NeedMissing(f"{words}: {done.stderr.decode().strip()}")
