"""What happens before the first page: kernels out of the cache, C functions found or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from transport.errors import TransportError
from transport.kernels import clib
from transport.kernels.compiled import warm_up


def test_a_second_process_compiles_nothing() -> None:
    assert warm_up().kernels > 0
    assert warm_up().cache_hit
    program = (
        "from transport.kernels.compiled import warm_up\n"
        "done = warm_up()\n"
        "print(done.compiled, done.kernels)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == [b"0", str(warm_up().kernels).encode()]


def test_a_first_compilation_is_told_and_a_cached_kernel_needs_no_compiler(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from transport.kernels.bitmap import _count, count\n"
        "compiled = _count.load(lambda: print('compiling'))\n"
        "print(compiled, 'numba.np.linalg' in sys.modules)\n"
        "import numpy as np\n"
        "print(count(np.array([5], np.uint64)))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, check=True, env=environment
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [[b"compiling", b"True", b"True", b"2"], [b"False", b"False", b"2"]]


def test_importing_the_encoder_and_decoder_loads_no_kernel() -> None:
    program = (
        "import transport.encoder, transport.decoder\n"
        "from transport.kernels import compiled\n"
        "assert compiled._kernels and not any(each._compiled for each in compiled._kernels)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_c_function_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clib, "_bound", False)
    monkeypatch.setattr(clib, "_LZ4_FUNCTIONS", ("LZ4_compress_by_magic",))
    with pytest.raises(clib.NativeLibraryError, match=r"export LZ4_compress_by_magic.*lz4>=4\.3"):
        clib.bind()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clib, "_bound", False)
    monkeypatch.setitem(sys.modules, "xxhash._xxhash", None)
    with pytest.raises(TransportError, match=r"xxhash\._xxhash cannot be loaded.*pip install"):
        clib.bind()


def test_an_lz4_state_that_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clib, "_bound", False)
    monkeypatch.setattr(clib, "LZ4_STATE_WORDS", 1)
    with pytest.raises(clib.NativeLibraryError, match="state of 16416 bytes"):
        clib.bind()


def test_a_package_without_a_shared_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clib, "_bound", False)
    monkeypatch.setitem(sys.modules, "lz4.block._block", sys.modules[__name__])
    with pytest.raises(clib.NativeLibraryError, match=r"lz4\.block\._block cannot be loaded"):
        clib.bind()
