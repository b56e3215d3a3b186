"""The data plane's compiled kernels, made ready before a migration counts its time."""

from collections.abc import Callable

import trio

from ferry.collector import collector_off
from ferry.progress import Reporter
from sync.vmm.stream.kernel import follow_records, signature
from transport.kernels.declare import Kernel
from transport.kernels.load import WarmUp, warm_up

STREAM_KERNEL = Kernel(follow_records, signature())
"""The loop over the VMM's stream, kept beside the data plane's."""


def warm_up_all(compiling: Callable[[], None] | None = None) -> WarmUp:
    """`warm_up` for all that a migration needs."""
    return warm_up(compiling, [STREAM_KERNEL])


async def make_kernels_ready(reporter: Reporter) -> None:
    """Load the kernels, or compile them, and say so: no phase's deadline has to allow for that.

    Raises `NativeLibraryError` and `CompilationFailed`.
    """

    def explain() -> None:
        text = "compiling the data plane's numba kernels, once on each machine: some ten seconds"
        reporter.event("message", text=text)

    with collector_off():
        done = await trio.to_thread.run_sync(warm_up_all, explain, abandon_on_cancel=True)
    if done.cache_hit:
        return
    text = f"the numba kernels are compiled, in {done.seconds:.1f} s"
    if done.not_kept:
        text += f"; they cannot be kept, so every start compiles them: {done.not_kept}"
    reporter.event("message", text=text)
