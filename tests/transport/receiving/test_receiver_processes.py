"""Ends of a session in processes of their own that die or hang in the middle of it."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import trio

from lab.children import start_child
from tests.transport import running
from transport.receiver import ReceiverOptions, open_receiver
from transport.sender import SenderOptions, open_sender
from transport.wire.errors import PeerLost

PAGE = 4096
N_PAGES = 2048
DEADLINE_S = 40
run_trio = partial(running.run_trio, deadline_s=DEADLINE_S)

RECEIVER = f"""
import sys, numpy, trio
from transport.receiver import open_receiver

async def main():
    async with open_receiver(sys.argv[1]) as receiver:
        print(receiver.url, flush=True)
        await receiver.wait_hello()
        await receiver.accept(b"")
        receiver.attach_memory(numpy.zeros({N_PAGES * PAGE}, numpy.uint8))
        while True:
            await receiver.tunnel_receive()

trio.run(main)
"""

SENDER = f"""
import os, sys, numpy, trio
from transport.sender import SenderOptions, open_sender

async def main():
    options = SenderOptions(bandwidth_bytes_per_s=2_000_000)
    async with open_sender(sys.argv[1], os.urandom(16), b"", options) as sender:
        memory = numpy.frombuffer(os.urandom({N_PAGES * PAGE}), numpy.uint8)
        sender.attach_memory(memory)
        await sender.send_round(numpy.arange({N_PAGES}, dtype=numpy.uint32), 1)

trio.run(main)
"""


async def until(condition: Callable[[], Any]) -> None:
    """Wait for something that notifies nobody."""
    for _ in iter(lambda: bool(condition()), True):
        await trio.sleep(0.01)


@contextmanager
def peer_process(script: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    with start_child(
        [sys.executable, "-c", script, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def bound_url_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_i8_a_receiver_that_dies_or_hangs_in_a_round_is_lost(bind_url: str, blow: int) -> None:
    async def scenario() -> None:
        with peer_process(RECEIVER, bind_url) as process:
            url = await trio.to_thread.run_sync(bound_url_of, process)
            options = SenderOptions(bandwidth_bytes_per_s=2_000_000, peer_timeout_s=3.0)
            memory = np.frombuffer(random.Random(1).randbytes(N_PAGES * PAGE), np.uint8)
            async with open_sender(url, os.urandom(16), b"", options) as sender:
                sender.attach_memory(memory)

                async def strike() -> None:
                    await until(lambda: (p := sender.round_progress()) and p.done_pages)
                    process.send_signal(blow)

                async def expect_loss(call: Callable[[], Awaitable[Any]]) -> None:
                    with pytest.raises(PeerLost):
                        while True:
                            await call()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(strike)
                    nursery.start_soon(expect_loss, sender.receive_record)
                    nursery.start_soon(expect_loss, sender.tunnel_receive)
                    nursery.start_soon(expect_loss, lambda: sender.tunnel_send(bytes(100_000)))
                    indices = np.arange(N_PAGES, dtype=np.uint32)
                    await expect_loss(lambda: sender.send_round(indices, 1))
                await expect_loss(sender.verify)
                await expect_loss(lambda: sender.send_record(1, b"", flush=True))

    run_trio(scenario)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_i8_a_sender_that_dies_or_hangs_in_a_round_is_lost(bind_url: str, blow: int) -> None:
    async def scenario() -> None:
        async with open_receiver(bind_url, ReceiverOptions(peer_timeout_s=3.0)) as receiver:
            with peer_process(SENDER, receiver.url) as process:
                await receiver.wait_hello()
                await receiver.accept(b"")
                receiver.attach_memory(np.zeros(N_PAGES * PAGE, np.uint8))
                await until(lambda: receiver.statistics().pages_applied)
                process.send_signal(blow)
                for call in (receiver.receive_record, receiver.tunnel_receive):
                    with pytest.raises(PeerLost):
                        await call()

    run_trio(scenario)
