"""What happens before the first page: kernels out of the cache, C functions found or not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transport.kernels import clib
from transport.kernels.bitmap import _count, _set
from transport.kernels.digests import _digest_pages
from transport.kernels.load import warm_up
from transport.wire.errors import TransportError

START = """
import numpy as np
from transport.kernels.bitmap import count
from transport.kernels.load import all_kernels, warm_up
assert not any(each.origin for each in all_kernels())
done = warm_up(lambda: print("compiling"))
print(done.cache_hit, done.not_kept or "kept", count(np.array([5], np.uint64)))
"""


def start(**environment: str) -> list[str]:
    """What a process of its own says."""
    command = [sys.executable, "-c", START]
    return subprocess.check_output(command, env={**os.environ, **environment}, text=True).split()


@pytest.mark.full
def test_a_first_compilation_is_told_and_a_second_process_needs_none(tmp_path: Path) -> None:
    said = [start(VFIO_FERRY_CACHE=str(tmp_path)) for _ in range(2)]
    assert said == [["compiling", "False", "kept", "2"], ["True", "kept", "2"]]


@pytest.mark.full
def test_a_process_that_may_keep_nothing_says_why_and_works(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = start(VFIO_FERRY_CACHE=str(tmp_path / "file"), NUMBA_OPT="0")
    assert said[:2] == ["compiling", "False"]
    assert "exists:" in said
    assert said[-1] == "2"


def test_kernels_are_loaded_once() -> None:
    assert warm_up().kernels > 0
    assert warm_up().cache_hit


@pytest.mark.parametrize("command", ["gateway", "resolve", "secret"])
def test_commands_that_need_no_kernels_do_without_numba(command: str) -> None:
    program = f"import sys, ferry.cli, ferry.commands.{command}\nprint('numba' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program]).split() == [b"False"]


WORDS = np.zeros(4, np.uint64)


@pytest.mark.parametrize(
    "unfit",
    [
        [0, 0],
        np.uint64(0),
        np.zeros(4, np.int64),
        np.zeros((2, 2), np.uint64),
        np.zeros(8, np.uint64)[::2],
        np.zeros(4, np.dtype(np.uint64).newbyteorder()),
    ],
    ids=["list", "scalar", "other type", "2-D", "stride", "other byte order"],
)
def test_what_is_no_array_of_the_signature_is_refused(unfit: object) -> None:
    with pytest.raises(TypeError):
        _count(unfit, np.uint64(0))


def test_a_kernel_writes_to_no_array_that_is_readonly() -> None:
    pages = np.zeros(1, np.uint32)
    bitmap = WORDS.copy()
    assert _set(bitmap, pages, 256) == 1
    bitmap.flags.writeable = False
    with pytest.raises(TypeError):
        _set(bitmap, pages, 256)
    assert bitmap[0] == 1


@pytest.mark.parametrize("arguments", [(WORDS,), (WORDS, np.uint64(1), np.uint64(2))])
def test_another_number_of_arguments_is_refused(arguments: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        _count(*arguments)


def test_another_tuple_than_that_of_the_signature_is_refused() -> None:
    numbers, seed = np.zeros(0, np.uint32), np.uint64(1)
    with pytest.raises(TypeError):
        _digest_pages(np.zeros(1, np.uint8), (WORDS,), numbers, seed, seed, WORDS)


def test_a_missing_c_function_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clib, "_LZ4_FUNCTIONS", ("LZ4_compress_by_magic",))
    with pytest.raises(clib.NativeLibraryError, match=r"export LZ4_compress_by_magic.*lz4>=4\.3"):
        clib.addresses()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash._xxhash", None)
    with pytest.raises(TransportError, match=r"xxhash\._xxhash cannot be loaded.*pip install"):
        clib.addresses()


def test_an_lz4_state_that_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clib, "LZ4_STATE_WORDS", 1)
    with pytest.raises(clib.NativeLibraryError, match="state of 16416 bytes"):
        clib.addresses()


def test_a_package_without_a_shared_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4.block._block", sys.modules[__name__])
    with pytest.raises(clib.NativeLibraryError, match=r"lz4\.block\._block cannot be loaded"):
        clib.addresses()
