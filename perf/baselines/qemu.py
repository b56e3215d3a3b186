"""A full copy of an image by QEMU's own migration, from one QEMU to another.

Owns the two QEMU processes. They are machines without a processor or a device (`-machine none`), so
what migrates is memory alone and no guest code runs. The source's memory is the image itself,
mapped and populated before the clock starts, as a running guest's is; the target's is shared and
untouched. Time and bytes are QEMU's own figures (query-migrate).
"""

import signal
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from ferry.doctor.qemu_program import Qemu, find_qemu
from ferry.errors import QemuMissing
from lab.qemu.environment import cached
from perf.baselines import DEADLINE_S, Copy
from perf.child import Cost, Stopwatch, process
from perf.errors import BenchmarkFailed, BenchUsageError, NeedMissing
from perf.links import TCP, Link
from perf.workloads.images import KeptMemory
from sync.vmm.client import QmpClient

POLL_S = 0.01
COMPARED_BYTES = 64 << 20
"""Bytes of the two memories that are compared at once, at the end of a copy."""
UNLIMITED = 1 << 40
"""A bandwidth limit, in bytes a second, that no link reaches: QEMU wants some number."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How QEMU migrates."""

    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


SETTINGS: Mapping[str, Setting] = {
    "plain": Setting(),
    "xbzrle": Setting(("xbzrle",)),
    "multifd": Setting(("multifd",), {"multifd-channels": 2}),
    "multifd-zstd": Setting(("multifd",), {"multifd-channels": 2, "multifd-compression": "zstd"}),
}
"""What QEMU's users choose among, by the names used in results."""


def setting(name: str) -> Setting:
    """The setting of that name. Raises `BenchUsageError` if there is none."""
    if name not in SETTINGS:
        raise BenchUsageError(f"QEMU has no peer {name!r}; there are {', '.join(SETTINGS)}")
    return SETTINGS[name]


def copy(image: Path, setting: Setting, *, link: Link = TCP) -> Copy:
    """Copy `image` over `link` with that setting of `SETTINGS`, and prove that all has arrived.

    Raises `NeedMissing` if there is no QEMU, `BenchmarkFailed` if the migration fails.
    """
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as folder:
        n_bytes = image.stat().st_size
        return trio.run(_copy, program(), image, n_bytes, setting, link, Path(folder))


def stream(image: Path, take: Callable[[socket.socket], None]) -> Cost:
    """What it costs QEMU to send `image` to a UNIX socket that `take` reads to its end.

    Raises `NeedMissing` if there is no QEMU, `BenchmarkFailed` if the migration fails.
    """
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as folder:
        return trio.run(_stream, program(), image, image.stat().st_size, take, Path(folder))


def program() -> Qemu:
    """The QEMU of this machine, or of the environment that `python -m lab.qemu prepare` makes.

    Raises `NeedMissing`.
    """
    try:
        return find_qemu()
    except QemuMissing as error:
        environment = cached()
        if environment is None:
            reason = f"{error} (`python -m lab.qemu prepare` makes one)"
            raise NeedMissing(reason) from error
        return environment.qemu


async def _copy(
    qemu: Qemu, image: Path, n_bytes: int, setting: Setting, link: Link, folder: Path
) -> Copy:
    source_memory = _image_as_memory(image)
    target_memory = "memory-backend-memfd,id=ram,share=on"
    with (
        process(
            _arguments(qemu, folder / "target", target_memory, n_bytes, "-incoming", "defer"),
            name="the target's QEMU",
            prefix=link.target_prefix,
            end=signal.SIGKILL,
        ) as target,
        process(
            _arguments(qemu, folder / "source", source_memory, n_bytes),
            name="the source's QEMU",
            prefix=link.source_prefix,
            end=signal.SIGKILL,
        ) as source,
        KeptMemory(n_bytes) as kept,
        trio.fail_after(DEADLINE_S),
    ):
        async with (
            await QmpClient.connect(str(folder / "target")) as target_qmp,
            await QmpClient.connect(str(folder / "source")) as source_qmp,
        ):
            for qmp in (target_qmp, source_qmp):
                await set_up(qmp, setting)
            await target_qmp.execute("migrate-incoming", to(listen_address(link, folder)))
            bound = (await target_qmp.execute("query-migrate"))["socket-address"][0]
            kept.give_back()
            watch = Stopwatch(source.pid, target.pid)
            await source_qmp.execute("migrate", to(bound))
            found = await _completed(source_qmp)
            await _completed(target_qmp)
            cost = watch.stop()
        compare(image, target.pid)
    return Copy(
        guest_bytes=n_bytes,
        wire_bytes=found["ram"]["transferred"],
        wall_s=found["total-time"] / 1e3,
        source_cpu_s=cost.cpu_s_of[source.pid],
        target_cpu_s=cost.cpu_s_of[target.pid],
    )


async def _stream(
    qemu: Qemu, image: Path, n_bytes: int, take: Callable[[socket.socket], None], folder: Path
) -> Cost:
    memory = _image_as_memory(image)
    with (
        process(
            _arguments(qemu, folder / "source", memory, n_bytes), name="QEMU", end=signal.SIGKILL
        ) as source,
        socket.socket(socket.AF_UNIX) as listener,
        trio.fail_after(DEADLINE_S),
    ):
        listener.bind(str(folder / "link"))
        listener.listen()
        async with await QmpClient.connect(str(folder / "source")) as qmp:
            await set_up(qmp, SETTINGS["plain"])
            watch = Stopwatch(source.pid)
            await qmp.execute("migrate", to({"type": "unix", "path": str(folder / "link")}))
            await trio.to_thread.run_sync(_accept, listener, take)
            cost = watch.stop()
            await _completed(qmp)
    return cost


def _arguments(
    qemu: Qemu, socket: Path, memory: str, n_bytes: int, *more: str
) -> Sequence[str | Path]:
    return [
        *(qemu.program, "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "none,memory-backend=ram", "-accel", "tcg", "-S"),
        *("-m", f"{n_bytes}B", "-object", f"{memory},size={n_bytes}"),
        *("-qmp", f"unix:{socket},server=on,wait=off", *more),
    ]


def _accept(listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
    connection, _ = listener.accept()
    with connection:
        take(connection)


def _image_as_memory(image: Path) -> str:
    return f"memory-backend-file,id=ram,mem-path={image},share=on,prealloc=on"


def listen_address(link: Link, folder: Path) -> dict[str, str]:
    """Where the target listens, as a SocketAddress of QAPI; the port is one that is free."""
    if link.sockets:
        return {"type": "unix", "path": str(folder / "link")}
    return {"type": "inet", "host": link.target_address, "port": "0"}


def to(address: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `migrate` and `migrate-incoming` that name an address."""
    return {"channels": [{"channel-type": "main", "addr": {"transport": "socket", **address}}]}


async def set_up(qmp: QmpClient, setting: Setting) -> None:
    """Gives one of two VMs that setting, and no limit of its bandwidth."""
    capabilities = [{"capability": name, "state": True} for name in setting.capabilities]
    await qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})
    await qmp.execute("migrate-set-parameters", {"max-bandwidth": UNLIMITED, **setting.parameters})


async def _completed(qmp: QmpClient) -> Any:
    """What query-migrate says once the migration has completed."""
    while True:
        found = await qmp.execute("query-migrate")
        if found["status"] == "completed":
            return found
        if found["status"] in ("failed", "cancelled"):
            raise BenchmarkFailed(f"QEMU: {found.get('error-desc', found['status'])}")
        await trio.sleep(POLL_S)


def compare(image: Path, target: int) -> None:
    """Raises `BenchmarkFailed` if the memory of the process `target` is not the image."""
    memory = _memory_of(target)
    with image.open("rb") as sent, memory.open("rb") as arrived:
        while expected := sent.read(COMPARED_BYTES):
            if arrived.read(COMPARED_BYTES) != expected:
                raise BenchmarkFailed("QEMU's copy differs from the image")


def _memory_of(pid: int) -> Path:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if "memory-backend-memfd" in str(entry.readlink()):
                return entry
    raise BenchmarkFailed("the target's QEMU has lost its memory")
