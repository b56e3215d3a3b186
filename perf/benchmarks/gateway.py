"""What the gateway costs a register access: latency of reads, and rate of posted writes.

Three ways alternate, against one trivial device each, every party in a process of its own: `direct`
(no gateway), `relayed` (passthrough) and `trapped` (captured into the journal). What is added is
the difference to `direct` of the same repetition, at the same quantile.

How long a read takes depends more on which cores have to be woken up for it than on anything else,
so `cores` says where everybody runs: `apart`: VMM and device have a core each, as a virtual CPU and
a device's process have, and the gateway is where the kernel puts it; `one`: all on one core, which
never sleeps; `free`: where the kernel puts them, which differs from run to run.
"""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import trio

from perf.benchmark import Context, Measurement
from perf.child import child
from perf.errors import BenchmarkFailed
from perf.results import Better
from perf.statistics import quantile
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.vfio_user.protocol import Command, RegionAccess, Version, encode_message

READ_BYTES = 4
WAIT_S = 20.0
BURST = 64
"""Posted writes between two reads that wait for them: a ring's worth of doorbells."""
QUANTILES = (0.5, 0.9, 0.99)


class Vmm:
    """Reads and writes registers as fast as the other side answers."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + WAIT_S
        while self._sock.connect_ex(str(path)):
            if time.monotonic() > deadline:
                raise BenchmarkFailed(f"nobody listens at {path}")
            time.sleep(0.01)
        self._sock.sendall(encode_message(1, Command.VERSION, Version().pack()))
        self._sock.recv(1 << 16)
        self._read = encode_message(2, Command.REGION_READ, RegionAccess(0, 0, READ_BYTES).pack())
        write = RegionAccess(0, 0, READ_BYTES, bytes(READ_BYTES)).pack()
        self._write = encode_message(3, Command.REGION_WRITE, write, no_reply=True)

    def read(self) -> None:
        self._sock.send(self._read)
        self._sock.recv(4096)

    def read_latencies_us(self, count: int) -> list[float]:
        clock = time.perf_counter_ns
        latencies = []
        for _ in range(count):
            began = clock()
            self.read()
            latencies.append((clock() - began) / 1e3)
        return latencies

    def posted_writes_per_s(self, count: int) -> float:
        send, write = self._sock.send, self._write
        began = time.perf_counter()
        for _ in range(count // BURST):
            for _ in range(BURST):
                send(write)
        # The answer to a read says that all writes before it were executed.
        self.read()
        return (count // BURST) * BURST / (time.perf_counter() - began)

    def close(self) -> None:
        self._sock.close()


def run(context: Context) -> Iterator[Measurement]:
    cores = sorted(os.sched_getaffinity(0))
    places = {"one": (cores[:1],) * 3, "free": (cores,) * 3}
    if len(cores) > 1:
        places["apart"] = (cores[:1], cores, cores[1:2])
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        party = partial(child, "perf.processes.registers", quiet=True)
        names = ("bare", "device", "gateway", "control")
        bare, device, gateway, control = (folder / name for name in names)
        devices = [stack.enter_context(party("device", str(path))).pid for path in (bare, device)]
        window_us = str(context.number("busy-poll"))
        process = party("gateway", str(gateway), str(device), str(control), window_us)
        gateway_process = stack.enter_context(process).pid
        ways = {"direct": Vmm(bare), "relayed": Vmm(gateway)}
        for vmm in ways.values():
            stack.callback(vmm.close)
        for number in range(context.repeat + 1):
            for name, (of_vmm, of_gateway, of_device) in places.items():
                os.sched_setaffinity(0, of_vmm)
                os.sched_setaffinity(gateway_process, of_gateway)
                for process_id in devices:
                    os.sched_setaffinity(process_id, of_device)
                found = trio.run(_repetition, context, ways, control, gateway_process)
                for each in found if number else ():
                    yield each._replace(dimensions={**each.dimensions, "cores": name})


async def _repetition(
    context: Context, ways: dict[str, Vmm], control: Path, gateway_process: int
) -> list[Measurement]:
    reads, writes = context.number("reads"), context.number("writes")
    cpu = {}
    latencies = {"direct": ways["direct"].read_latencies_us(reads)}
    before = _cpu_us(gateway_process)
    latencies["relayed"] = ways["relayed"].read_latencies_us(reads)
    cpu["relayed"] = _cpu_us(gateway_process) - before
    rates = {way: vmm.posted_writes_per_s(writes) for way, vmm in ways.items()}
    async with await GatewayClient.connect(control, role=ClientRole.SOURCE) as gateway:
        await gateway.mediate(tracker="none", capture=True)
        vmm = ways["relayed"]
        # In this thread as the others: nothing else is to be done meanwhile.
        before = _cpu_us(gateway_process)
        latencies["trapped"] = vmm.read_latencies_us(reads)
        cpu["trapped"] = _cpu_us(gateway_process) - before
        rates["trapped"] = vmm.posted_writes_per_s(writes)
        part = await gateway.journal(1)
        await gateway.passthrough()
    if part.overflow:
        raise BenchmarkFailed("the journal overflowed: fewer accesses have to be asked for")
    found = [
        Measurement("gateway_cpu", cpu_us / reads, "us/read", "lower", {"way": way})
        for way, cpu_us in cpu.items()
    ]
    for way, values in latencies.items():
        where = {"way": way}
        rate_better: Better = "neither" if way == "direct" else "higher"
        found.append(Measurement("posted_writes", rates[way], "1/s", rate_better, where))
        for q in QUANTILES:
            value, direct = quantile(values, q), quantile(latencies["direct"], q)
            name = f"p{q * 100:.0f}"
            better: Better = "neither" if way == "direct" else "lower"
            found.append(Measurement(f"read_{name}", value, "us", better, where))
            if way != "direct":
                found.append(Measurement(f"added_{name}", value - direct, "us", "lower", where))
    return found


def _cpu_us(process: int) -> float:
    """Microseconds of CPU time that the main thread of a process has used so far."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e3
