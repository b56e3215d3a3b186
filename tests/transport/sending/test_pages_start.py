"""What happens before the first page: kernels out of the cache, C functions found or not."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transport.kernels import clib
from transport.kernels.bitmap import _assign, _count
from transport.kernels.declare import kernel, readonly, warm_up
from transport.kernels.files import FILES
from transport.wire.errors import TransportError

START = """
import sys
import numpy as np
from transport.kernels.bitmap import count
from transport.kernels.declare import warm_up
done = warm_up(lambda: print("compiling"))
print(done.cache_hit, count(np.array([5], np.uint64)))
print({"numba", "llvmlite"} & set(sys.modules))
"""


def test_a_first_compilation_is_told_and_a_second_process_needs_no_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "VFIO_FERRY_CACHE": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", START], stdout=subprocess.PIPE, check=True, env=environment
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [[b"compiling", b"False", b"2", b"set()"], [b"True", b"2", b"set()"]]
    [image] = (tmp_path / "kernels").iterdir()
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert stat.S_IMODE(image.parent.stat().st_mode) == 0o700


def test_kernels_are_loaded_once() -> None:
    assert warm_up().kernels > 0
    assert warm_up().cache_hit


def test_importing_the_encoder_and_decoder_loads_no_kernel() -> None:
    program = (
        "import transport.sending.encoder, transport.receiving.decoder\n"
        "from transport.kernels import compiled\n"
        "assert compiled._kernels and not any(each._entry for each in compiled._kernels)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


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
    with pytest.raises(TypeError, match=r"bitmap\._count: argument 0"):
        _count(unfit, 0)


def test_a_kernel_writes_to_no_array_that_is_readonly() -> None:
    pages = np.zeros(1, np.uint32)
    bitmap = WORDS.copy()
    assert _assign(bitmap, pages, 256, True) == 1
    bitmap.flags.writeable = False
    with pytest.raises(TypeError, match="argument 0"):
        _assign(bitmap, pages, 256, False)
    assert bitmap[0] == 1


@pytest.mark.parametrize(
    "arguments", [(WORDS,), (WORDS, 1, 2), (WORDS, -1), (WORDS, 1 << 64), (WORDS, 1.5)]
)
def test_scalars_that_do_not_fit_the_signature_are_refused(arguments: tuple[object, ...]) -> None:
    with pytest.raises(TypeError, match=r"bitmap\._count"):
        _count(*arguments)


def test_too_short_a_tuple_is_no_tuple_of_the_signature() -> None:
    @kernel(FILES, readonly(np.uint8))
    def unused(files: object, other: object) -> None: ...

    from transport.kernels import compiled

    compiled._kernels.remove(unused)
    unused.bind(1)  # it must not get so far
    with pytest.raises(TypeError, match="2 arguments for 7"):
        unused((WORDS,), np.zeros(1, np.uint8))


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
