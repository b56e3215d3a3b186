"""QEMU processes whose stream is opened: their memory, their control, and a move by hand.

The guest's RAM is in memfds, as those that `vfio-ferry` moves have it; what the gateway's memory
map would say of them is given by the layout of QEMU's PC machines.
"""

import json
import mmap
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ferry.doctor.qemu_program import Qemu
from ferry.migration.kernels import STREAM_KERNEL
from lab.children import start_child
from sync.memory import GuestMemory, MemoryRegion
from sync.vmm.stream.mapping import FileRange
from sync.vmm.stream.opened import OpenedStream
from sync.vmm.stream.reader import Announced, PassEnded, PassOn, TailBegan

MIB, GIB = 1 << 20, 1 << 30
DEADLINE_S = 60.0
POLL_S = 0.02
CHUNK_BYTES = 1 << 20
MAX_HELD_BYTES = 16 * MIB
LEGACY_HOLE = 0xA0000, 0x100000
"""What is there of a PC's RAM is no device's to reach."""


@dataclass(frozen=True)
class Spec:
    """A machine. `backends` are the sizes of its NUMA nodes, or of its only memory."""

    machine: str = "q35"
    backends: tuple[int, ...] = (256 * MIB,)
    low_bytes: int = 0x80000000
    """RAM below 4 GiB, if there is more."""
    more: tuple[str, ...] = ()
    huge: bool = False
    runs: bool = False

    def arguments(self) -> list[str]:
        total = sum(self.backends)
        machine = f"{self.machine},memory-backend=ram0" if len(self.backends) == 1 else self.machine
        words = ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
        words += ["-machine", machine, "-cpu", "max", "-m", f"{total}B", *self.more]
        huge = ",hugetlb=on,hugetlbsize=2M" if self.huge else ""
        for number, size in enumerate(self.backends):
            backend = f"memory-backend-memfd,id=ram{number},size={size},share=on{huge}"
            words += ["-object", backend]
            if len(self.backends) > 1:
                words += ["-numa", f"node,nodeid={number},memdev=ram{number}"]
        return words

    def layout(self) -> Iterator[tuple[int, int, int, int]]:
        """(guest-physical address, bytes, number of the backend, byte of it), as a DMA map."""
        low, at = self.low_bytes, 0
        for number, size in enumerate(self.backends):
            here = 0
            while here < size:
                part = min(size - here, low - at) if at < low else size - here
                yield at, part, number, here
                here, at = here + part, at + part
                if at == low:
                    at = 4 * GIB

    def regions(self) -> Iterator[tuple[int, int, int, int]]:
        """The layout without the legacy hole; hugepages cannot be cut there."""
        for at, size, number, here in self.layout():
            if at or self.huge:
                yield at, size, number, here
            else:
                begin, end = LEGACY_HOLE
                yield 0, begin, number, 0
                yield end, size - end, number, end


class Qmp:
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        until(lambda: not self._socket.connect_ex(str(path)))
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": words}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


@dataclass
class Machine:
    spec: Spec
    process: "subprocess.Popen[bytes]"
    qmp: Qmp
    files: list[int] = field(default_factory=list)
    """Descriptors of the backends, in their order."""

    def status(self) -> str:
        return str(self.qmp("query-status")["status"])

    @contextmanager
    def memory(self) -> Iterator[tuple[GuestMemory, list[FileRange]]]:
        regions = [
            MemoryRegion(at, size, here, True, self.files[number])
            for at, size, number, here in self.spec.regions()
        ]
        memory = GuestMemory.map(regions, writable=True)
        ranges = [
            FileRange(memory.page_of(r.iova), r.length // 4096, os.fstat(r.fd).st_ino, r.offset)
            for r in regions
        ]
        try:
            yield memory, ranges
        finally:
            memory.close()


@contextmanager
def running(qemu: Qemu, folder: Path, spec: Spec, *more: str) -> Iterator[Machine]:
    """A QEMU, paused unless the machine is to run."""
    folder.mkdir()
    path = folder / "qmp"
    command = [str(qemu.program), *spec.arguments(), *more]
    command += ["-qmp", f"unix:{path},server=on,wait=off"]
    if not spec.runs or "-incoming" in more:
        command.append("-S")
    process = start_child(command, stdin=subprocess.DEVNULL)
    machine = None
    try:
        machine = Machine(spec, process, Qmp(path))
        links = [
            link
            for link in sorted(Path(f"/proc/{process.pid}/fd").iterdir(), key=lambda p: int(p.name))
            if "memfd:memory-backend-memfd" in str(link.readlink())
        ]
        machine.files = [os.open(link, os.O_RDWR) for link in links]
        assert [os.fstat(fd).st_size for fd in machine.files] == list(spec.backends)
        yield machine
    finally:
        process.kill()
        process.wait()
        for fd in machine.files if machine else ():
            os.close(fd)


@dataclass
class Move:
    """What came of a move."""

    announced: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """By flat page."""
    mapped: set[str]
    carried: set[str]
    n_in: int = 0
    n_passed_on: int = 0
    n_pages: int = 0
    n_pass_ends: int = 0


def migrate(source: Machine, target: Machine, folder: Path) -> Move:
    """Moves the guest: its stream opened, its pages from file to file, then the tail."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "out"))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        target.qmp("migrate-incoming", uri=f"unix:{folder}/in")
        sink = stack.enter_context(socket.socket(socket.AF_UNIX))
        sink.connect(str(folder / "in"))
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        source.qmp("migrate", uri=f"unix:{folder}/out")
        stream = stack.enter_context(listener.accept()[0])
        stream.settimeout(DEADLINE_S)
        memory, ranges = stack.enter_context(source.memory())
        target_memory, _ = stack.enter_context(target.memory())
        opened = OpenedStream(
            memory.array,
            ranges,
            max_held_bytes=MAX_HELD_BYTES,
            max_tail_bytes=64 * MIB,
            kernel=STREAM_KERNEL,
        )
        move = Move(np.zeros(memory.n_pages, np.bool_), opened.mapped, opened.carried)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while n := stream.recv_into(buffer):
            move.n_in += n
            opened.feed(buffer[:n])
            while (event := opened.next_event()) is not None:
                match event:
                    case Announced(pages):
                        move.announced[pages] = True
                        move.n_pages += len(pages)
                    case PassOn(data):
                        move.n_passed_on += len(data)
                        sink.sendall(data)
                    case PassEnded():
                        move.n_pass_ends += 1
                    case TailBegan():
                        _copy(memory, target_memory, move.announced)
        opened.reader.end()
        sink.shutdown(socket.SHUT_WR)
    until(lambda: source.qmp("query-migrate")["status"] in ("completed", "failed"))
    assert source.qmp("query-migrate")["status"] == "completed"
    # Not before it has loaded the tail: it would have ended otherwise.
    until(lambda: target.status() in ("paused", "prelaunch", "running"))
    return move


def _copy(source: GuestMemory, target: GuestMemory, announced: Any) -> None:
    """The announced pages; those of zeros are holes at the target already."""
    for page in np.flatnonzero(announced).tolist():
        content = source.array[page * 4096 : (page + 1) * 4096]
        if content.any():
            target.array[page * 4096 : (page + 1) * 4096] = content


def fill(machine: Machine, seed: int, n_pages: int = 400) -> None:
    """Distinct pages in each backend, above all at the edges of what is mapped."""
    rng = np.random.default_rng(seed)
    for fd, size in zip(machine.files, machine.spec.backends, strict=True):
        total = size // 4096
        low, high = LEGACY_HOLE[0] // 4096, LEGACY_HOLE[1] // 4096
        edges = [0, low - 1, low, high - 1, high, machine.spec.low_bytes // 4096, total - 1]
        pages = [*edges, *range(1, 60), *rng.integers(0, total, n_pages).tolist()]
        for page in {page for page in pages if page < total}:
            _write(fd, rng.bytes(4096), page * 4096, machine.spec.huge)
        for page in rng.integers(0, total, 50).tolist():
            _write(fd, b"\xa5" * 4096, page * 4096, machine.spec.huge)


def _write(fd: int, content: bytes, offset: int, huge: bool) -> None:
    if not huge:
        os.pwrite(fd, content, offset)
        return
    # hugetlbfs has no write(2).
    begin = offset & ~(2 * MIB - 1)
    with mmap.mmap(fd, 2 * MIB, offset=begin) as mapped:
        mapped[offset - begin : offset - begin + len(content)] = content


def assert_equal(source: Machine, target: Machine) -> None:
    """All of the backends' bytes, those that no device reaches included."""
    for one, other, size in zip(source.files, target.files, source.spec.backends, strict=True):
        for at in range(0, size, 4 * MIB):
            n = min(4 * MIB, size - at)
            assert os.pread(one, n, at) == os.pread(other, n, at), f"differs behind {at:#x}"


def assert_nonzero_announced(source: Machine, move: Move) -> None:
    with source.memory() as (memory, _):
        for first in range(0, memory.n_pages, 1 << 14):
            part = memory.array[first * 4096 : (first + (1 << 14)) * 4096].reshape(-1, 4096)
            filled = part.any(axis=1)
            assert not np.any(filled & ~move.announced[first : first + len(part)])


SPECS: dict[str, Spec] = {
    "q35": Spec(),
    "q35-vga": Spec(more=("-device", "VGA")),
    "pc": Spec("pc"),
    "pc-vga": Spec("pc", more=("-device", "VGA")),
    "numa": Spec(backends=(128 * MIB, 128 * MIB)),
    "hole": Spec(backends=(6 * GIB,)),
    "huge": Spec(backends=(64 * MIB,), huge=True),
}
