"""Full copies: what is sent by the bare stream, what is compared, and the image that is copied."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.baselines import qemu
from perf.errors import BenchmarkFailed, BenchUsageError, NeedMissing
from perf.processes.tcp import deal, nonzero_runs
from perf.workloads import images
from perf.workloads.images import FILE_PREFIX, FolderPages, Mix, image_file
from transport.wire.frames import PAGE_BYTES


@given(filled=st.lists(st.booleans(), min_size=1, max_size=60), parts=st.integers(1, 5))
def test_each_filled_page_is_dealt_once(filled: list[bool], parts: int) -> None:
    image = np.zeros((len(filled), PAGE_BYTES), np.uint8)
    image[filled, -1] = 1
    dealt = deal(nonzero_runs(image.reshape(-1)), parts)
    pages = [
        page // PAGE_BYTES
        for part in dealt
        for start, end in part
        for page in range(start, end, PAGE_BYTES)
    ]
    assert pages == np.flatnonzero(filled).tolist()
    sizes = [sum(end - start for start, end in part) for part in dealt]
    assert max(sizes) - min(sizes) <= PAGE_BYTES


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(images, "SHARED", tmp_path)
    return tmp_path


def test_an_image_is_there_for_the_block_alone(shared: Path) -> None:
    of_the_dead = shared / f"{FILE_PREFIX}{2**22 + 1}"  # above any process id, proc(5)
    of_the_living = shared / f"{FILE_PREFIX}{os.getppid()}"
    of_the_dead.touch()
    of_the_living.touch()
    with pytest.raises(KeyboardInterrupt), image_file(64 * PAGE_BYTES, Mix(zero=0.5)) as path:
        pages = np.fromfile(path, np.uint8).reshape(-1, PAGE_BYTES)
        assert 0 < np.count_nonzero(pages.any(axis=1)) < len(pages) == 64
        raise KeyboardInterrupt
    assert [*shared.iterdir()] == [of_the_living]


def test_an_image_of_a_folder_holds_its_files(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a").write_bytes(b"a" * (PAGE_BYTES + 1))
    (folder / "b").write_bytes(bytes(PAGE_BYTES) + b"b")
    with image_file(4 * PAGE_BYTES, Mix(zero=0), file_pages=FolderPages(folder)) as path:
        pages = np.fromfile(path, np.uint8).reshape(-1, PAGE_BYTES)
    assert [bytes(page[:2]) for page in pages] == [b"aa", b"a\0", b"b\0", b"aa"]


def test_a_folder_without_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(bytes(PAGE_BYTES))
    with pytest.raises(BenchUsageError, match="no file"):
        FolderPages(tmp_path)(np.random.default_rng(), 1)


def test_memory_is_kept_until_it_is_given_back() -> None:
    script = (
        "from pathlib import Path; from perf.workloads.images import KeptMemory;"
        "now = lambda: int(Path('/proc/self/status').read_text().split('VmRSS:')[1].split()[0]);"
        "found = [now()]; kept = KeptMemory(256 << 20);"
        "found.append(now()); kept.give_back(); found.append(now()); print(*found)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    before, kept, after = map(int, done.stdout.split())
    assert kept - before > 255 << 10
    assert after - before < 1 << 10


def test_a_copy_that_differs_is_no_result(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * PAGE_BYTES)
    memory = os.memfd_create("memory-backend-memfd")
    try:
        os.write(memory, b"x" * PAGE_BYTES)
        qemu.compare(image, os.getpid())
        os.pwrite(memory, b"y", PAGE_BYTES - 1)
        with pytest.raises(BenchmarkFailed, match="differs"):
            qemu.compare(image, os.getpid())
    finally:
        os.close(memory)


def test_without_a_qemu_it_is_said_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("VFIO_FERRY_CACHE", str(tmp_path))
    with pytest.raises(NeedMissing, match="makes one"):
        qemu.program()
