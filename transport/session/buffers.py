"""Memory that goes to libzmq with the message in it.

Owns the way past pyzmq, which has a thread of its own learn of each message that libzmq is done
with, and wants the GIL for that. Here libzmq frees the memory by itself, as soon as the kernel has
the bytes, so the next message is often made where the caches still have the one before. The
functions are those of the libzmq that pyzmq has loaded (zmq_msg_init_data(3), zmq_msg_send(3)).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import zmq

from transport.kernels.clib import address_of, load_library

_PYZMQ: Final = "zmq.backend.cython._zmq"
_NOBLOCK: Final = int(zmq.NOBLOCK)
_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 32 << 20  # the largest threshold that glibc takes
_Message = ctypes.c_uint64 * 8  # zmq.h: zmq_msg_t


def keep_message_memory() -> None:
    """Let the process keep the memory of large messages from one to the next (mallopt(3)).

    A message is allocated, by a lane or by libzmq, and glibc gives blocks of that size back to the
    kernel at once: every message would be paid for with a page fault for each 4 KiB. No effect
    elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_message_memory() -> None:
    """What was kept and is free goes back to the kernel (malloc_trim(3)). No effect elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class MessageBuffer:
    """Room for one message. For one thread; `send` or `free` is to be called once."""

    def __init__(self, n_bytes: int) -> None:
        """MemoryError: there is none. `NativeLibraryError`: pyzmq's libzmq is not to be found."""
        self._address = _functions().allocate(n_bytes)
        if not self._address:
            raise MemoryError(f"{n_bytes} bytes for a message")
        room = (ctypes.c_uint8 * n_bytes).from_address(self._address)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(memoryview(room), np.uint8)
        """uint8 (n_bytes), aligned to 16 bytes. Not to be touched once it is sent or free."""

    def send(self, zsocket: zmq.Socket[bytes], n_bytes: int) -> None:
        """Send the first `n_bytes` without waiting; the memory is libzmq's from now on.

        zmq.ZMQError: nothing was sent, and the memory is free.
        """
        functions = _functions()
        message = _Message()
        at = ctypes.addressof(message)
        self._forget()
        if functions.init(at, self._address, n_bytes, functions.release, None) != 0:
            functions.free(self._address)
            raise MemoryError("a message's few bytes of administration")
        if functions.send(at, zsocket.underlying, _NOBLOCK) < 0:
            error = zmq.ZMQError(ctypes.get_errno())
            functions.close(at)
            raise error

    def free(self) -> None:
        """Give the memory back unsent."""
        self._forget()
        _functions().free(self._address)

    def _forget(self) -> None:
        self.array = np.empty(0, np.uint8)


class _Functions(NamedTuple):
    allocate: Any
    free: Any
    release: int
    """`free` for libzmq, which calls it with one argument more (zmq_free_fn), to be ignored."""
    init: Any
    send: Any
    close: Any


@functools.cache
def _functions() -> _Functions:
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libzmq = load_library(_PYZMQ)
    libc = ctypes.CDLL(None)

    def declare(library: ctypes.CDLL, name: str, kind: Any, result: Any, *arguments: Any) -> Any:
        return kind(result, *arguments)(address_of(library, name))

    # What takes no time keeps the GIL: to get it back may take long.
    short, long = ctypes.PYFUNCTYPE, functools.partial(ctypes.CFUNCTYPE, use_errno=True)
    return _Functions(
        allocate=declare(libc, "malloc", short, pointer, size),
        free=declare(libc, "free", short, None, pointer),
        release=address_of(libc, "free"),
        init=declare(
            libzmq, "zmq_msg_init_data", short, number, pointer, pointer, size, pointer, pointer
        ),
        send=declare(libzmq, "zmq_msg_send", long, number, pointer, pointer, number),
        close=declare(libzmq, "zmq_msg_close", short, number, pointer),
    )
