"""Processes that work for another one and are of no use without it."""

import ctypes
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
