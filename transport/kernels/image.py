"""An image: machine code that runs at any address, as a file and in memory.

In a file: SHA-256 of what follows, length of the description (uint32, little-endian), the
description in JSON (`entries`, `imports`), the code. The digest finds what was torn or corrupted;
it does not say who made it, so an image is only read from where nobody else can write (`cache`).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_LENGTH: Final = struct.Struct("<I")
_ADDRESS: Final = struct.Struct("<Q")
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


@dataclass(frozen=True)
class LoadedImage:
    """Code that can be called, for as long as this object lives."""

    address: int
    entries: Mapping[str, int]
    _memory: ctypes.Array[ctypes.c_char]


@dataclass(frozen=True)
class Image:
    """Code, and what is where in it, in bytes from its start."""

    code: bytes
    entries: Mapping[str, int]
    """Where each function starts that can be called from outside."""
    imports: Mapping[str, int]
    """Where the address of each C function belongs that the code calls (uint64)."""

    def to_bytes(self) -> bytes:
        description = json.dumps({"entries": self.entries, "imports": self.imports}).encode()
        content = _LENGTH.pack(len(description)) + description + self.code
        return hashlib.sha256(content).digest() + content

    @classmethod
    def from_bytes(cls, data: bytes) -> Image:
        """Raises ValueError for what `to_bytes` has not made."""
        content = data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != data[:_DIGEST_BYTES]:
            raise ValueError("a corrupt image")
        end = _LENGTH.size + _LENGTH.unpack_from(content)[0]
        description = json.loads(content[_LENGTH.size : end])
        return cls(content[end:], description["entries"], description["imports"])

    def load(self, functions: Mapping[str, int]) -> LoadedImage:
        """The code in memory of its own, calling `functions`, by name. It is not writable any more.

        OSError if the system does not allow that.
        """
        memory = mmap.mmap(-1, len(self.code), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = self.code
        for name, offset in self.imports.items():
            _ADDRESS.pack_into(memory, offset, functions[name])
        pinned = (ctypes.c_char * len(self.code)).from_buffer(memory)
        address = ctypes.addressof(pinned)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(
            ctypes.c_void_p(address),
            ctypes.c_size_t(len(self.code)),
            mmap.PROT_READ | mmap.PROT_EXEC,
        ):
            number = ctypes.get_errno()
            raise OSError(number, f"the kernels cannot be run: {os.strerror(number)}")
        return LoadedImage(address, self.entries, pinned)
