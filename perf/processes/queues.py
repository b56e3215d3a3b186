"""A controller with queues, at a gateway and without one: `python -m perf.processes.queues JSON`.

The JSON has `where`: `vfio-user`, a controller process of ours, or `l1`, a function of this host,
which is the emulated one. Prints each measurement as a JSON line with the fields of
`perf.benchmark.Measurement`. `perf.benchmarks.hardware` says what is measured.
"""

import ctypes
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import trio

from lab.l1 import inside
from perf.benchmark import Measurement
from perf.benchmarks.gateway import Vmm
from perf.child import process
from perf.errors import BenchmarkFailed
from perf.statistics import quantile
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.queues.nvme.device_class import Nvme
from sync.queues.nvme.specification import CC_ENABLE, DEFAULT_CC, Admin, Fid, Reg, Sqe
from sync.queues.nvme.state import CompletionQueue, ControllerState, Feature, SubmissionQueue
from sync.vfio.device import VfioDevice
from sync.vfio.executor import Executor, complete
from sync.vfio.sysfs import PciFunction
from sync.vfio.user_device import UserDevice
from sync.vfio_user.protocol import HEADER, Command, DmaMap, PciRegion, RegionAccess, encode_message
from transport.kernels.digests import scan_changed

ADMIN_ENTRIES = 64
BASE = 0x100_0000
STEP = 0x10_0000
"""Between two rings of a walk: the largest has 64 KiB."""
AHEAD_OF_REST = 8
"""Commands that a guest submits between the walk ahead of time and its pause."""
PAGES = 32
"""That a round of commands lets the controller write."""
L1_BYTES = 64 << 20
DEADLINE_S = 60.0
DEMO_DEADLINE_S = 300.0


class Guest(Vmm):
    """A VMM that shares memory, and its guest's admin queue."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        super().__init__(path)
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, n_bytes)
            message = encode_message(4, Command.DMA_MAP, DmaMap(3, 0, 0, n_bytes).pack())
            socket.send_fds(self._sock, [message], [fd])
            self._memory = mmap.mmap(fd, 1 << 20)
        finally:
            os.close(fd)
        self._answered()
        self._tail = self._head = 0
        self._phase = 1
        self._put(PciRegion.CONFIG, 4, b"\x06\x00")
        size = ADMIN_ENTRIES - 1
        for register, value in (
            (Reg.AQA, size << 16 | size),
            (Reg.ASQ, 0x1000),
            (Reg.ASQ + 4, 0),
            (Reg.ACQ, 0x2000),
            (Reg.ACQ + 4, 0),
            (Reg.CC, DEFAULT_CC | CC_ENABLE),
        ):
            self._put(0, register, struct.pack("<I", value))
        end = time.monotonic() + DEADLINE_S
        while not self._get(0, Reg.CSTS) & 1:
            if time.monotonic() > end:
                raise BenchmarkFailed("the controller does not get ready")
        # A doorbell that tells of nothing new: what it costs to watch and to pass it on.
        doorbell = RegionAccess(0x1000, 0, 4, bytes(4)).pack()
        self._write = encode_message(3, Command.REGION_WRITE, doorbell, no_reply=True)

    def commands(self, count: int) -> None:
        """Has the controller write a page for each."""
        for number in range(count):
            command = Sqe(Admin.IDENTIFY, number, prp1=0x10000 + 4096 * number, cdw10=1)
            at = 0x1000 + 64 * self._tail
            self._memory[at : at + 64] = command.pack()
            self._tail = (self._tail + 1) % ADMIN_ENTRIES
        self._put(0, 0x1000, struct.pack("<I", self._tail))
        end = time.monotonic() + DEADLINE_S
        while count:
            if self._memory[0x2000 + 16 * self._head + 14] & 1 == self._phase:
                count -= 1
                self._head = (self._head + 1) % ADMIN_ENTRIES
                self._phase ^= self._head == 0
            elif time.monotonic() > end:
                raise BenchmarkFailed("a command does not end")
        self._put(0, 0x1004, struct.pack("<I", self._head))

    def _put(self, region: int, offset: int, data: bytes) -> None:
        access = RegionAccess(offset, region, len(data), data).pack()
        self._sock.sendall(encode_message(5, Command.REGION_WRITE, access))
        self._answered()

    def _get(self, region: int, offset: int) -> int:
        access = RegionAccess(offset, region, 4).pack()
        self._sock.sendall(encode_message(6, Command.REGION_READ, access))
        return int.from_bytes(self._answered()[-4:], "little")

    def _answered(self) -> bytes:
        answer = self._sock.recv(4096)
        if HEADER.unpack_from(answer)[4]:
            raise BenchmarkFailed("the gateway refuses what a guest does first")
        return answer


def walks(device: VfioDevice | UserDevice, entries: list[int]) -> Iterator[Measurement]:
    """By size of a pair of I/O queues that stands as far as it can: a walk ahead of time, and the
    rest of it in the pause."""
    kind, executor = Nvme(), Executor(device)
    device.reset()
    inventory = complete(executor.work(kind.inventory()))
    for size in entries:
        walk = kind.walk(inventory)
        where = {"queue": size}
        total = 2 * size - 1
        began = time.perf_counter()
        complete(executor.work(walk.ahead(_state(size, total).pack())))
        ahead_s = time.perf_counter() - began
        began = time.perf_counter()
        complete(executor.work(walk.finish(_state(size, total + AHEAD_OF_REST).pack())))
        rest_s = time.perf_counter() - began
        yield Measurement("walk_ahead", ahead_s * 1e3, "ms", "lower", where)
        yield Measurement("walk_rest", rest_s * 1e3, "ms", "lower", where)
        device.reset()


def _state(size: int, commands: int) -> ControllerState:
    """A guest that has given so many commands to a pair of I/O queues, and set it up before."""
    bases = [BASE + STEP * number for number in range(4)]
    admin = ADMIN_ENTRIES - 1
    one = (size - 1) << 16 | 1
    cq = Sqe(Admin.CREATE_CQ, 0, prp1=bases[2], cdw10=one, cdw11=1 << 16 | 3)
    sq = Sqe(Admin.CREATE_SQ, 0, prp1=bases[3], cdw10=one, cdw11=1 << 16 | 1)
    queues = Sqe(Admin.SET_FEATURES, 0, cdw10=Fid.NUMBER_OF_QUEUES, cdw11=1 << 16 | 1)
    position = commands % (2 * size)
    return ControllerState(
        DEFAULT_CC | CC_ENABLE,
        admin << 16 | admin,
        bases[0],
        bases[1],
        0,
        {
            0: SubmissionQueue(0, ADMIN_ENTRIES, bases[0], 0, tail=8),
            1: SubmissionQueue(1, size, bases[3], 1, sq.pack(), commands % size),
        },
        {
            0: CompletionQueue(0, ADMIN_ENTRIES, bases[1], position=8, head=8),
            1: CompletionQueue(1, size, bases[2], cq.pack(), 1, position, position % size),
        },
        [Feature(queues.pack(), b"")],
        [],
    )


def accesses(
    device: VfioDevice | UserDevice, guest: Guest, reads: int, doorbells: int
) -> Iterator[Measurement]:
    """Reads of a register by whoever owns the function, and by a VMM; its doorbells."""
    direct = []
    for _ in range(reads):
        began = time.perf_counter_ns()
        device.read(0, 0, 4)
        direct.append((time.perf_counter_ns() - began) / 1e3)
    ways = {"direct": direct, "gateway": guest.read_latencies_us(reads)}
    for way, values in ways.items():
        for q in (0.5, 0.99):
            where = {"way": way}
            yield Measurement(f"read_p{q * 100:.0f}", quantile(values, q), "us", "lower", where)
    rate = guest.posted_writes_per_s(doorbells)
    yield Measurement("doorbells", rate, "1/s", "higher")


def pinning(device: VfioDevice, n_bytes: int) -> Iterator[Measurement]:
    """Of so much memory, all of which is there: shown to a function, and taken away again."""
    memory = mmap.mmap(-1, n_bytes)
    np.frombuffer(memory, np.uint8)[::4096] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    times = [time.perf_counter()]
    device.map_dma(BASE, n_bytes, address)
    times.append(time.perf_counter())
    device.unmap_dma(BASE, n_bytes)
    times.append(time.perf_counter())
    for name, took_s in zip(("pin", "unpin"), np.diff(times), strict=True):
        where = {"guest-mib": n_bytes >> 20}
        yield Measurement(name, float(took_s) * 1e3, "ms", "lower", where)


async def log_ms(guest: Guest, control: Path, rounds: int) -> float:
    """How long it takes to collect what the queues say is dirty, in milliseconds, at the median."""
    times = []
    async with await GatewayClient.connect(control, role=ClientRole.SOURCE) as gateway:
        mediation = await gateway.mediate(tracker="queues", capture=False)
        for descriptor in mediation.dirty:
            os.close(descriptor)
        for _ in range(rounds):
            guest.commands(PAGES)
            began = time.perf_counter()
            await gateway.dirty()
            times.append((time.perf_counter() - began) * 1e3)
        await gateway.passthrough()
    return quantile(times, 0.5)


def scan_ms(n_bytes: int) -> float:
    """How long a scan of so much memory takes of which nothing is there: every page is the same
    one, in the processor's cache, so that no guest's is faster."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = np.frombuffer(mmap.mmap(-1, n_bytes, flags, mmap.PROT_READ), np.uint8)
    digests = np.zeros(n_bytes // 4096, np.uint64)
    scan_changed(memory, digests, 1)
    began = time.perf_counter()
    scan_changed(memory, digests, 1)
    return (time.perf_counter() - began) * 1e3


def downtime(functions: list[str]) -> Iterator[Measurement]:
    """Of the demonstration's guest, whose load goes on."""
    words = [word for each in functions for word in ("--function", each)]
    command = [sys.executable, "-m", "ferry.cli", "demo", "--device", "nvme", "--json", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEMO_DEADLINE_S, check=False
    )
    report = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    if done.returncode or report.get("event") != "report":
        raise BenchmarkFailed(
            f"the demonstration failed: {done.stdout[-500:]} {done.stderr[-500:]}"
        )
    yield Measurement("downtime", report["downtime_total_ms"], "ms", "lower")
    yield Measurement("downtime_own", report["downtime_own_ms"], "ms", "lower")


@contextmanager
def gateway(folder: Path, device: str) -> Iterator[Path]:
    """A gateway in a process of its own; the folder of its sockets."""
    at = Path(tempfile.mkdtemp(dir=folder))
    words = ("gateway", "--device", device, "--listen", at / "vmm", "--control", at / "control")
    queues = () if device.startswith("vfio:") else ("--queues",)
    command = [sys.executable, "-m", "ferry.cli", *map(str, (*words, *queues))]
    with process(command, name="gateway", quiet=True):
        yield at


def main(settings: dict[str, Any]) -> None:
    functions: list[PciFunction] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if settings["where"] == "l1":
            inside.take_kernels()
            functions = inside.functions("nvme")
            for function in functions:
                stack.callback(function.restore, function.bind())
            n_bytes = L1_BYTES
        else:
            image = folder / "image"
            image.write_bytes(bytes(1 << 20))
            for name in "ab":
                command = ["nvme", "--socket", str(folder / name), "--image", str(image)]
                it = process([sys.executable, "-m", "ferry.cli", *command], name="nvme", quiet=True)
                stack.enter_context(it)
                _await(folder / name)
            n_bytes = int(settings["gib"]) << 30
        own = VfioDevice(functions[0]) if functions else UserDevice(folder / "a")
        stack.callback(own.close)
        other = f"vfio:{functions[1].address}" if functions else str(folder / "b")
        with gateway(folder, other) as at:
            _await(at / "vmm")
            guest = Guest(at / "vmm", n_bytes)
            stack.callback(guest.close)
            for _ in range(int(settings["repeat"])):
                for found in walks(own, [int(each) for each in settings["entries"].split("+")]):
                    tell(found)
                for found in accesses(own, guest, int(settings["reads"]), settings["doorbells"]):
                    tell(found)
                if isinstance(own, VfioDevice):
                    for found in pinning(own, n_bytes):
                        tell(found)
                took = trio.run(log_ms, guest, at / "control", int(settings["rounds"]))
                memory = {"guest-mib": n_bytes >> 20}
                tell(Measurement("dirty_by_queues", took, "ms", "lower", memory))
                if not functions:
                    took = scan_ms(n_bytes)
                    tell(Measurement("dirty_by_scan", took, "ms", "neither", memory))
    for _ in range(int(settings["moves"])):
        for found in downtime([each.address for each in functions]):
            tell(found)
    print("end", flush=True)


def tell(found: Measurement) -> None:
    print(json.dumps(found._asdict()), flush=True)


def _await(path: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while not path.exists():
        if time.monotonic() > end:
            raise BenchmarkFailed(f"nobody listens at {path}")
        time.sleep(0.05)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
