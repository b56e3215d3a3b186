"""Memory that somebody else cuts short is an error, and no signal."""

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sync.bounce import Bounce, cannot_shrink

PAGE = 4096
SIZE = 4 * PAGE
CUT_SHORT = """
import mmap, os, sys
from sync.gateway.datapath.dma import AtDevice, DmaFault, DmaMemory
from sync.vfio_user.protocol import DmaMap
memory = DmaMemory()
file = os.memfd_create("ram")
os.ftruncate(file, 16 << 12)
memory.add(DmaMap(3, 0, 0x10000, 16 << 12), os.dup(file)).at_device = AtDevice.MESSAGE
memory.write(0x10000, b"here")
os.ftruncate(file, 1 << 12)
assert memory.read(0x10000, 4) == b"here"
for access in (lambda: memory.read(0x12000, 4), lambda: memory.write(0x12000, b"gone"),
               lambda: memory.read(0x10ffe, 4), lambda: memory.write(0x10ffe, b"gone")):
    try:
        access()
    except DmaFault as fault:
        print(fault.errno)
assert os.fstat(file).st_size == 1 << 12
"""


@pytest.fixture
def file() -> int:
    return os.memfd_create("ram", os.MFD_ALLOW_SEALING)


def test_i9_a_ram_file_that_is_cut_short_costs_the_access_and_not_the_process() -> None:
    run = [sys.executable, "-c", CUT_SHORT]
    process = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    assert process.returncode == 0
    assert process.stdout.split() == [str(errno.EFAULT)] * 4


def test_bytes_come_and_go_as_they_are(file: int) -> None:
    os.ftruncate(file, SIZE)
    bounce = Bounce()
    for number in (file, os.open(f"/proc/self/fd/{file}", os.O_RDWR)):
        with mmap.mmap(number, SIZE) as mapping:
            data = bytes(range(256)) * 20
            bounce.write(mapping, 100, memoryview(data))
            assert mapping[100 : 100 + len(data)] == bounce.read(mapping, 100, len(data)) == data
            assert mapping[:100] == bytes(100)
        os.close(number)
    bounce.close()


def test_only_a_file_that_is_sealed_against_it_cannot_shrink(file: int, tmp_path: Path) -> None:
    os.ftruncate(file, SIZE)
    assert not cannot_shrink(file)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    assert not cannot_shrink(file)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert cannot_shrink(file)
    with (tmp_path / "ram").open("wb") as plain:
        assert not cannot_shrink(plain.fileno())
    os.close(file)
