"""What holds for every test: none asserts on elapsed time, not even hypothesis' own deadline.

Tests with a real QEMU are skipped where none can be had, but not in CI.
"""

import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

from ferry.errors import QemuError
from lab.qemu.environment import Environment, prepare
from lab.qemu.initramfs import build_initramfs, write_initramfs
from tests.qemu.moving import unable

# Whoever starts the tests in the background may have had signals ignored, which children inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False
)
settings.load_profile("house")


@pytest.fixture
def open_fds() -> Iterator[Callable[[], int]]:
    """A function that counts the descriptors this process has open. What tests before have left is
    closed before or after this one; what nobody has any more of this one does not count."""

    def count() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    gc.freeze()  # a collection then looks at this test's objects only
    yield count
    gc.unfreeze()


@pytest.fixture(scope="session")
def environment() -> Environment:
    try:
        return prepare(print)
    except QemuError as error:
        unable(f"no QEMU and guest for it can be had here: {error}")


@pytest.fixture(scope="session")
def initramfs(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("initramfs") / "initramfs.cpio"
    write_initramfs(path, build_initramfs(environment))
    return path


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with TemporaryDirectory(prefix="fq-") as folder:
        yield Path(folder)
