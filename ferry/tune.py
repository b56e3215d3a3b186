"""`vfio-ferry tune`: measures this machine and a link, and writes a configuration for `send`.

Owns the measurements: the codecs on one core, and pages over the link with different settings. The
other end is `vfio-ferry tune --listen` on the other host, or one that is started here, over the
loopback. What follows from the figures is `ferry.tuning`'s. No guest is needed or touched.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio
from numpy.typing import NDArray

from ferry.check import scratch
from ferry.children import start_child
from ferry.config import endpoint, option
from ferry.errors import ConfigError, Exit, LocalError
from ferry.progress import Reporter
from ferry.receive import memory_available
from ferry.secret import HELP, read_secret
from ferry.tuning import CodecSample, LinkSample, Settings, as_toml, choose
from sync.memory import PAGE_BYTES
from transport.codec import NONE
from transport.encoder import Encoder
from transport.errors import EndpointError, PeerClosed, TransportError
from transport.frames import DEFAULT_FRAME_BYTES
from transport.page_costs import LADDER
from transport.receiver import ReceiverOptions, open_receiver
from transport.replica import Replica
from transport.sender import SenderOptions, open_sender

Bytes = NDArray[np.uint8]

GREETING = b"tune"
SAMPLE_BYTES = 8 << 20
LINK_SETTINGS = tuple((lanes, 1 << bits) for lanes in (1, 2, 4) for bits in (20, 22))
FIRST_PAGES = 64
"""Sent first; then four times as many each time, until it takes long enough to tell the rate."""
GROWTH = 4
ENOUGH_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    to: str | None = option(
        "where `tune --listen` listens on the other host (default: loopback)", None, parse=endpoint
    )
    listen: str | None = option("be the other end, until interrupted", None, parse=endpoint)
    sample: str | None = option(
        "a file like what the guest's memory holds (default: code of this program)", None
    )
    secret: str | None = option(HELP, None)
    output: str | None = option("write the configuration to this file, not the terminal", None)
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    """Measures, or is the other end; returns the exit code."""
    if options.listen is not None and options.to is not None:
        raise ConfigError("--to and --listen are two ends of one link: give one of them")
    if options.output is not None and not Path(options.output).absolute().parent.is_dir():
        raise LocalError(f"{options.output} cannot be written: there is no such folder")
    secret = read_secret(options.secret)
    reporter = Reporter("tune", as_json=options.json)
    if options.listen is not None:
        return trio.run(_listen, options.listen, secret, reporter)
    sample = _sample(options.sample)
    with _other_end(options) as url:
        settings = trio.run(_measure, url, secret, sample, reporter)
    document = as_toml(settings, options.to or "the loopback of this machine")
    if options.output is None:
        reporter.event("configuration", text=document)
        return Exit.OK
    Path(options.output).write_text(document, encoding="utf-8")
    reporter.event("message", text=f"written to {options.output}; use it by --config")
    return Exit.OK


async def _listen(url: str, secret: bytes | None, reporter: Reporter) -> Exit:
    announced = False
    while True:
        try:
            async with open_receiver(url, ReceiverOptions(secret=secret)) as link:
                url = link.url
                if not announced:
                    reporter.event("listening", url=url)
                    announced = True
                if (await link.wait_hello()).payload != GREETING:
                    await link.refuse(b'{"reason": "this is vfio-ferry tune, not receive"}')
                    continue
                await link.accept(b"")
                link.attach_memory(scratch())
                while True:
                    await link.receive_record()
        except PeerClosed:
            continue
        except EndpointError:
            raise
        except TransportError as error:
            reporter.event("message", text=f"a sender has failed: {error}")


async def _measure(url: str, secret: bytes | None, sample: Bytes, reporter: Reporter) -> Settings:
    codecs = []
    for each in await trio.to_thread.run_sync(lambda: list(measure_codecs(sample))):
        text = (
            f"{each.name:<8} {PAGE_BYTES / each.page_s / 1e6:8.0f} MB/s on one core, "
            f"{each.page_bytes / PAGE_BYTES:.2f} of the size"
        )
        reporter.event("codec", name=each.name, page_s=each.page_s, text=text)
        codecs.append(each)
    links = []
    for lanes, frame_bytes in LINK_SETTINGS:
        rate = await measure_link(url, secret, lanes, frame_bytes)
        text = f"{lanes} lanes, frames of {frame_bytes >> 10:>4} KiB: {rate / 1e6:8.0f} MB/s"
        reporter.event("link", lanes=lanes, frame_bytes=frame_bytes, bytes_per_s=rate, text=text)
        links.append(LinkSample(lanes, frame_bytes, rate))
    return choose(links, codecs, len(os.sched_getaffinity(0)), memory_available())


def measure_codecs(sample: Bytes) -> Iterator[CodecSample]:
    """Every codec that `auto` knows, on whole pages (`sample`: uint8, some MiB), one core."""
    n_pages = sample.size // PAGE_BYTES
    indices = np.arange(n_pages, dtype=np.uint32)
    out = np.empty(DEFAULT_FRAME_BYTES, np.uint8)
    encoder = Encoder(sample, Replica(n_pages, 0), 0)
    for codec in LADDER:
        encoder.codec = codec
        encoder.forget(indices)
        start = sequence = n_bytes = 0
        began = time.thread_time()
        while start < n_pages:
            done = encoder.encode(indices, start, out, round_no=0, sequence=sequence)
            start += done.consumed
            sequence += 1
            n_bytes += done.n_bytes
        yield CodecSample(str(codec), (time.thread_time() - began) / n_pages, n_bytes / n_pages)


async def measure_link(url: str, secret: bytes | None, lanes: int, frame_bytes: int) -> float:
    """Bytes per second of random pages as they are. Raises `TransportError`."""
    options = SenderOptions(lanes=lanes, frame_bytes=frame_bytes, codec=NONE, secret=secret)
    async with open_sender(url, os.urandom(16), GREETING, options) as link:
        memory = scratch()
        memory[:] = np.random.default_rng().integers(0, 256, memory.size, np.uint8)
        link.attach_memory(memory, cache_bytes=0)
        words = memory.view(np.uint64).reshape(-1, PAGE_BYTES // 8)
        # The first round waits until both sides have loaded their code.
        await link.send_round(np.arange(lanes, dtype=np.uint32), 0)
        count, round_no = FIRST_PAGES, 1
        while True:
            count = min(count, words.shape[0])
            words[:, 0] += np.uint64(1)  # or nothing would be sent again
            done = await link.send_round(np.arange(count, dtype=np.uint32), round_no)
            seconds = done.duration_ns / 1e9
            if seconds >= ENOUGH_S or (count == words.shape[0] and round_no > GROWTH):
                return count * PAGE_BYTES / seconds
            count, round_no = count * GROWTH, round_no + 1


@contextmanager
def _other_end(options: Options) -> Iterator[str]:
    """The given one, or a process of our own on the loopback."""
    if options.to is not None:
        yield options.to
        return
    command = [sys.executable, "-m", "ferry.cli", "tune", "--listen", "tcp://127.0.0.1:0", "--json"]
    if options.secret is not None:
        command += ["--secret", options.secret]
    with start_child(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield _bound(process.stdout.readline())
        finally:
            process.kill()


def _bound(line: str) -> str:
    """Where the other end listens, from what it says first."""
    try:
        return str(json.loads(line)["url"])
    except (ValueError, KeyError):
        raise LocalError("the other end of the loopback does not start") from None


def _sample(path: str | None) -> Bytes:
    """Whole pages of the file, or of the compiled modules that this process has loaded."""
    if path is not None:
        content = Path(path).read_bytes()[:SAMPLE_BYTES]
        if len(content) < PAGE_BYTES:
            raise ConfigError(f"{path} holds less than a page")
    else:
        files = {getattr(module, "__file__", None) for module in sys.modules.values()}
        content = b""
        for file in sorted(name for name in files if name and name.endswith(".so")):
            content += Path(file).read_bytes()
    whole = min(len(content), SAMPLE_BYTES) // PAGE_BYTES * PAGE_BYTES
    pages: Bytes = np.frombuffer(content[:whole], np.uint8).copy()
    return pages
