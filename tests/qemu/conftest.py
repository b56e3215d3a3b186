"""What the tests with a real QEMU share. Where none can be had they are skipped, but not in CI."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ferry.qemu.environment import Environment, prepare
from ferry.qemu.errors import QemuError
from ferry.qemu.initramfs import build_initramfs, write_initramfs
from tests.qemu.moving import unable


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "qemu: starts a real QEMU")


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
