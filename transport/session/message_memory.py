"""What becomes of the memory of messages when they are gone (glibc; no effect elsewhere).

glibc gives blocks as large as a frame back to the kernel at once, so that each message would be
paid for with a page fault for every 4 KiB. So the process keeps them from one message to the next,
and gives them back when strangers have had a lot of it.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 32 << 20  # the largest threshold that glibc takes

_libc = ctypes.CDLL(None)


def keep_message_memory() -> None:
    """Let the process keep the memory of large messages that are gone (mallopt(3))."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_message_memory() -> None:
    """Give what was kept and is free back to the kernel (malloc_trim(3))."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
