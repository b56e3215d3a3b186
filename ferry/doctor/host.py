"""This host: what `send`, `receive`, a gateway and a VMM need of any machine."""

import mmap
import os
import platform
import resource
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from ferry.findings import Finding, note, ok, problem
from ferry.host_memory import memory_available
from ferry.migration.kernels import warm_up_all
from ferry.progress import bytes_text
from sync.memory import PAGE_BYTES
from transport.kernels.clib import NativeLibraryError, addresses
from transport.kernels.declare import CompilationFailed
from transport.receiver import open_receiver
from transport.user_cache import CACHE_VARIABLE
from transport.wire.errors import EndpointError

TESTED_ARCHITECTURE = "x86_64"
DESCRIPTORS = 1024
"""Linux's usual limit. A gateway holds one for each region of guest memory and each interrupt
vector, `send` one for each region."""
SHARED_MEMORY = Path("/dev/shm")


async def host_findings(listen: tuple[str, ...]) -> AsyncIterator[Finding]:
    """Findings on this machine. `listen`: the endpoints to try to bind; by default one of each
    kind."""
    yield _machine()
    for finding in await trio.to_thread.run_sync(_kernels):
        yield finding
    yield _shared_memory()
    yield _room()
    yield _descriptors()
    with tempfile.TemporaryDirectory(prefix="vfio-ferry-") as folder:
        for url in listen or ("tcp://127.0.0.1:*", f"ipc://{folder}/link.sock"):
            yield await _endpoint(url)


def _machine() -> Finding:
    text = f"{platform.system()} {platform.release()} on {platform.machine()}, Python "
    text += platform.python_version()
    if sys.platform != "linux":
        return problem("machine", text, "use Linux")
    if platform.machine() != TESTED_ARCHITECTURE:
        advice = f"try it out first: it has been tested on {TESTED_ARCHITECTURE} alone"
        return note("machine", text, advice)
    return ok("machine", text)


def _kernels() -> list[Finding]:
    try:
        addresses()
    except NativeLibraryError as error:
        return [problem("C libraries", str(error))]
    found = [ok("C libraries", "LZ4 and XXH3 can be called")]
    try:
        done = warm_up_all()
    except CompilationFailed as error:
        advice = "install numba again, and look at what it says"
        return [*found, problem("kernels", str(error), advice)]
    if done.cache_hit:
        text = f"{done.kernels} numba kernels, found in the cache in {done.seconds:.1f} s"
        return [*found, ok("kernels", text)]
    text = f"{done.kernels} numba kernels compiled in {done.seconds:.1f} s"
    if done.not_kept:
        text += f"; they cannot be kept, so every start compiles them: {done.not_kept}"
        return [*found, note("kernels", text, f"set ${CACHE_VARIABLE} to a folder of your own")]
    return [*found, ok("kernels", f"{text}; from now on they are found in the cache")]


def _shared_memory() -> Finding:
    """Whether memory can be made that several processes map, as guest memory is."""
    try:
        descriptor = os.memfd_create("vfio-ferry", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, PAGE_BYTES)
            mmap.mmap(descriptor, PAGE_BYTES).close()
        finally:
            os.close(descriptor)
    except OSError as error:
        advice = "allow memfd_create(2) and mmap(2), which guest memory needs"
        return problem("shared memory", f"no memfd can be had: {error.strerror}", advice)
    return ok("shared memory", "memfd can be made and mapped")


def _room() -> Finding:
    text = f"{bytes_text(memory_available())} are available to guests"
    try:
        stat = os.statvfs(SHARED_MEMORY)
    except OSError:
        return ok("memory", f"{text}; there is no {SHARED_MEMORY}")
    room = bytes_text(stat.f_bavail * stat.f_frsize)
    return ok("memory", f"{text}, {room} are free in {SHARED_MEMORY}")


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} may be open in a process"
    if 0 <= soft < DESCRIPTORS:
        advice = f"raise RLIMIT_NOFILE (`ulimit -n {DESCRIPTORS}`; the hard limit is {hard})"
        return note("descriptors", text, advice)
    return ok("descriptors", text)


async def _endpoint(url: str) -> Finding:
    kind = url.partition(":")[0]
    try:
        async with open_receiver(url) as link:
            return ok(f"{kind} endpoint", f"{link.url} can be bound")
    except EndpointError as error:
        return problem(f"{kind} endpoint", str(error), "choose another address for --listen")
