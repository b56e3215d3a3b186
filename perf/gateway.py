"""What the gateway costs a register access: latency of reads and rate of posted writes.

Three ways are measured against one trivial device, each party in a process of its own: `direct`
(no gateway), `relayed` (passthrough) and `mediated` (captured into the journal). One JSON line for
each way and measure, with unit; `added_us` is the difference to `direct` at the same quantile.

    python -m perf.gateway [--reads N] [--writes N]
"""

import argparse
import gc
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import trio

from sync.gateway.client import GatewayClient
from sync.gateway.loop import GatewayOptions
from sync.gateway.main import run as run_gateway
from sync.vfio_user.protocol import (
    FLAG_ERROR,
    FLAG_NO_REPLY,
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    Capabilities,
    Command,
    DeviceInfo,
    IrqInfo,
    RegionAccess,
    RegionInfo,
    Version,
    encode_message,
)

READ = 4
WARM_UP = 2000
WAIT_S = 20.0
BURST = 64
"""Posted writes between two reads that wait for them: a ring's worth of doorbells."""


def serve_device(path: str) -> None:
    """The trivial device: one client after the other, registers that read as zeros."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    gc.disable()
    while True:
        client, _ = listener.accept()
        _serve_client(client)


def _serve_client(client: socket.socket) -> None:
    waiting = b""
    unpack = HEADER.unpack_from
    while True:
        data = client.recv(1 << 18)
        if not data:
            return
        waiting += data
        position = 0
        replies = b""
        while len(waiting) - position >= HEADER_BYTES:
            message_id, command, size, flags, _ = unpack(waiting, position)
            if len(waiting) - position < size:
                break
            if not flags & FLAG_NO_REPLY:
                body = waiting[position + HEADER_BYTES : position + size]
                replies += _answer(message_id, command, body)
            position += size
        waiting = waiting[position:]
        if replies:
            client.sendall(replies)


def _answer(message_id: int, command: int, body: bytes) -> bytes:
    if command == Command.REGION_READ:
        count = int.from_bytes(body[12:16], "little")
        size = HEADER_BYTES + len(body) + count
        return HEADER.pack(message_id, command, size, FLAG_REPLY, 0) + body + bytes(count)
    if command == Command.VERSION:
        answer = Version(capabilities=Capabilities(max_msg_fds=16)).pack()
    elif command == Command.DEVICE_GET_INFO:
        answer = DeviceInfo(3, 9, 5).pack()
    elif command == Command.DEVICE_GET_REGION_INFO:
        answer = RegionInfo(body[8], 3, 4096).pack()
    elif command == Command.DEVICE_GET_IRQ_INFO:
        answer = IrqInfo(body[8], 1, 0).pack()
    elif command == Command.REGION_WRITE:
        answer = body[:16]
    else:
        flags = FLAG_REPLY | FLAG_ERROR
        return HEADER.pack(message_id, command, HEADER_BYTES, flags, 95)
    return encode_message(message_id, command, answer, reply=True)


class Vmm:
    """Reads and writes registers as fast as the other side answers."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + WAIT_S
        while self._sock.connect_ex(str(path)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody listens at {path}")
            time.sleep(0.01)
        self._sock.sendall(encode_message(1, Command.VERSION, Version().pack()))
        self._sock.recv(1 << 16)
        self._read = encode_message(2, Command.REGION_READ, RegionAccess(0, 0, READ).pack())
        write = RegionAccess(0, 0, READ, bytes(READ)).pack()
        self._write = encode_message(3, Command.REGION_WRITE, write, no_reply=True)

    def read(self) -> None:
        self._sock.send(self._read)
        self._sock.recv(4096)

    def read_latencies_ns(self, count: int) -> list[int]:
        clock = time.perf_counter_ns
        latencies = []
        for _ in range(count):
            began = clock()
            self.read()
            latencies.append(clock() - began)
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


def measure(way: str, vmm: Vmm, reads: int, writes: int) -> dict[str, float]:
    """Prints what `way` takes; returns the quantiles of the read latency, in microseconds."""
    vmm.read_latencies_ns(min(WARM_UP, reads))
    latencies = statistics.quantiles(vmm.read_latencies_ns(reads), n=100)
    quantiles = {f"p{q}": latencies[q - 1] / 1e3 for q in (50, 90, 99)}
    emit(way, "read_latency", "us", **quantiles)
    emit(way, "posted_writes", "1/s", rate=vmm.posted_writes_per_s(writes))
    return quantiles


def emit(way: str, name: str, unit: str, **values: float) -> None:
    rounded = {key: round(value, 2) for key, value in values.items()}
    print(json.dumps({"benchmark": "gateway", "way": way, "name": name, "unit": unit, **rounded}))


async def measure_mediated(control: Path, vmm: Vmm, reads: int, writes: int) -> dict[str, float]:
    async with await GatewayClient.connect(control, role="source") as gateway:
        await gateway.mediate(tracker="none", capture=True)
        quantiles = await trio.to_thread.run_sync(measure, "mediated", vmm, reads, writes)
        part = await gateway.journal(1)
        emit("mediated", "journal_overflow", "bool", overflow=float(part.overflow))
        await gateway.passthrough()
    return quantiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reads", type=int, default=20000, help="reads for each way")
    parser.add_argument("--writes", type=int, default=100000, help="posted writes for each way")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(*options.part)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        device, gateway = folder / "device", folder / "gateway"
        control = folder / "control"
        start(stack, "device", str(device))
        vmm = Vmm(device)
        direct = measure("direct", vmm, options.reads, options.writes)
        vmm.close()
        start(stack, "gateway", str(gateway), str(device), str(control))
        vmm = Vmm(gateway)
        ways = {"relayed": measure("relayed", vmm, options.reads, options.writes)}
        ways["mediated"] = trio.run(measure_mediated, control, vmm, options.reads, options.writes)
        for way, quantiles in ways.items():
            added = {key: value - direct[key] for key, value in quantiles.items()}
            emit(way, "added_read_latency", "us", **added)
        vmm.close()


def start(stack: ExitStack, *part: str) -> None:
    command = [sys.executable, "-m", "perf.gateway", "--part", *part]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(os.kill, process.pid, signal.SIGTERM)


def run_part(kind: str, *paths: str) -> None:
    if kind == "device":
        serve_device(paths[0])
    else:
        vmm, device, control = (Path(path) for path in paths)
        run_gateway(GatewayOptions(vmm_path=vmm, device_path=device, control_path=control))


if __name__ == "__main__":
    main()
