"""The process that compiles for another one: `python -m transport.kernels PID >FILE`.

It ends with the process PID, its parent, for which nobody else could use what it makes.
"""

import ctypes
import gc
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """From here on the kernel kills this process when the thread that has started it ends
    (prctl(2)); that one waits for it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process to compile for has ended")


def main() -> None:
    end_with(int(sys.argv[1]))
    # Not before: numba takes a while.
    from transport.kernels.compiler import compile_image

    gc.disable()  # what the compiler makes stays until its end; looking for garbage takes 6 %
    sys.stdout.buffer.write(compile_image().to_bytes())


if __name__ == "__main__":
    main()
