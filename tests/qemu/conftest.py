"""What the tests with a real QEMU share. They run with VFIO_FERRY_QEMU=1, which makes the
environment where there is none."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ferry.qemu.environment import Environment, prepare
from ferry.qemu.initramfs import build_initramfs, write_initramfs


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "qemu: starts a real QEMU")


@pytest.fixture(scope="session")
def environment() -> Environment:
    if os.environ.get("VFIO_FERRY_QEMU") != "1":
        pytest.skip("tests with a real QEMU run with VFIO_FERRY_QEMU=1")
    return prepare(print)


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
