"""This project's sender: `python -m perf.processes.sender URL IMAGE OPTIONS`.

OPTIONS are fields of `SenderOptions`, as JSON, the codec by its name or `auto`. Prints `READY` once
both sides have loaded their code; then, at a line on standard input, sends every page of the file
IMAGE and prints what `RoundStatistics` says, as JSON; at the next one, compares all pages and
prints how many differ.
"""

import json
import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from transport.sender import SenderOptions, open_sender
from transport.wire.codec import Codec
from transport.wire.frames import PAGE_BYTES, STRIPE_PAGES

READY = "ready"


def mapped(image: Path) -> tuple[npt.NDArray[np.uint8], int]:
    """A file as an array, uint8, mapped shared and read-only, and its descriptor."""
    descriptor = os.open(image, os.O_RDONLY)
    return np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8), descriptor


async def send(url: str, image: Path, options: Mapping[str, Any]) -> None:
    memory, descriptor = mapped(image)
    n_pages = memory.size // PAGE_BYTES
    codec = options.get("codec", "auto")
    chosen = None if codec == "auto" else Codec.parse(codec)
    settings = SenderOptions(**{**options, "codec": chosen})
    async with open_sender(url, os.urandom(16), b"", settings) as sender:
        sender.attach_memory(memory, files=[(0, n_pages, descriptor, 0)])
        # A page of each lane: answered once both sides have loaded their code.
        await sender.verify(np.arange(settings.lanes, dtype=np.uint32) * STRIPE_PAGES)
        print(READY, flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        pages = np.arange(n_pages, dtype=np.uint32)
        print(json.dumps(asdict(await sender.send_round(pages, 0))), flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        print((await sender.verify()).size, flush=True)
        await sender.send_record(0, b"", flush=True)


def main() -> None:
    url, image, options = sys.argv[1:]
    trio.run(send, url, Path(image), json.loads(options))


if __name__ == "__main__":
    main()
