"""Two ends of bare connections: `python -m perf.processes.tcp receive HOST CONNECTIONS BYTES` and
`send HOST:PORT CONNECTIONS IMAGE`; a path instead of HOST and HOST:PORT stands for a UNIX socket.

The receiver prints where it listens, and puts what arrives, BYTES in all, into fresh shared memory.
The sender prints how many bytes of IMAGE are in pages that are not zero, and at a line on standard
input sends these pages from where they are, an equal part on each connection; when all is
acknowledged by the receiver, it prints a line.
"""

import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perf.processes.receivers import fresh_memory
from perf.processes.sender import mapped
from transport.wire.frames import PAGE_BYTES

PIECE_BYTES = 256 << 10
"""Bytes that are received at once. They are written to the file of the memory, which costs less
than to receive into a mapping of it that has no pages yet."""
DONE = b"done"


def nonzero_runs(image: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Start and end, in bytes, of the runs of pages of `image` that are not all zero."""
    pages = image.view(np.uint64).reshape(-1, PAGE_BYTES // 8)
    filled = np.concatenate([[False], pages.any(axis=1), [False]])
    edges = np.flatnonzero(filled[1:] != filled[:-1]) * PAGE_BYTES
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def deal(runs: list[tuple[int, int]], n_parts: int) -> list[list[tuple[int, int]]]:
    """The bytes of these runs dealt into `n_parts` parts, as equal in length as whole pages
    allow."""
    left = sum(end - start for start, end in runs)
    parts: list[list[tuple[int, int]]] = []
    waiting = runs[::-1]
    for n_open in range(n_parts, 0, -1):
        room = -(-left // PAGE_BYTES // n_open) * PAGE_BYTES
        left -= room
        part = []
        while room:
            start, end = waiting.pop()
            cut = min(end, start + room)
            if cut < end:
                waiting.append((cut, end))
            part.append((start, cut))
            room -= cut - start
        parts.append(part)
    return parts


def in_threads(works: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        for running in [pool.submit(work) for work in works]:
            running.result()


def _listen(host: str) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_server((host, 0))
    listener = socket.socket(socket.AF_UNIX)
    Path(host).unlink(missing_ok=True)  # of the copy before
    listener.bind(host)
    listener.listen()
    return listener


def _connect(address: str) -> socket.socket:
    if not address.startswith("/"):
        host, _, port = address.partition(":")
        return socket.create_connection((host, int(port)))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def receive(host: str, connections: int, n_bytes: int) -> None:
    _, memory = fresh_memory(n_bytes)
    with _listen(host) as listener:
        name = listener.getsockname()
        print(name if listener.family == socket.AF_UNIX else f"{host}:{name[1]}", flush=True)
        peers = [listener.accept()[0] for _ in range(connections)]

    def drain(peer: socket.socket) -> None:
        start = int.from_bytes(peer.recv(8, socket.MSG_WAITALL))
        end = int.from_bytes(peer.recv(8, socket.MSG_WAITALL))
        piece = memoryview(bytearray(PIECE_BYTES))
        while start < end:
            n_bytes = peer.recv_into(piece, min(end - start, PIECE_BYTES), socket.MSG_WAITALL)
            start += os.pwrite(memory, piece[:n_bytes], start)
        peer.sendall(DONE)

    in_threads([lambda peer=peer: drain(peer) for peer in peers])  # type: ignore[misc]
    sys.stdin.readline()


def send(address: str, connections: int, path: Path) -> None:
    image, _ = mapped(path)
    parts = deal(nonzero_runs(image), connections)
    sizes = [sum(end - start for start, end in part) for part in parts]
    peers = [_connect(address) for _ in parts]
    print(sum(sizes), flush=True)
    sys.stdin.readline()

    def push(number: int) -> None:
        peer, first = peers[number], sum(sizes[:number])
        peer.sendall(first.to_bytes(8) + (first + sizes[number]).to_bytes(8))
        for start, end in parts[number]:
            peer.sendall(image.data[start:end])
        peer.recv(len(DONE), socket.MSG_WAITALL)

    in_threads([lambda number=number: push(number) for number in range(connections)])  # type: ignore[misc]
    print("sent", flush=True)
    sys.stdin.readline()


def main() -> None:
    role, address, connections, what = sys.argv[1:]
    if role == "receive":
        receive(address, int(connections), int(what))
    else:
        send(address, int(connections), Path(what))


if __name__ == "__main__":
    main()
