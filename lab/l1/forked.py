"""Commands of vfio-ferry as processes that begin with all their imports made.

What a processor imports in a second takes an emulated one most of a minute. So one process does it
once, and each command is a fork of that one: otherwise as one that a user starts.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.reduction import DupFd
from typing import IO, Any

_FORKS = get_context("forkserver")


def prepare() -> None:
    """Begin with the imports; returns at once."""
    from multiprocessing.forkserver import ensure_running

    _FORKS.set_forkserver_preload(["lab.l1.imports"])
    ensure_running()


class Forked:
    """What `lab.testbed` asks of a process that runs a command."""

    def __init__(
        self, arguments: Sequence[str], stderr: IO[bytes], prefix: Sequence[str] = ()
    ) -> None:
        assert not prefix
        read, write = os.pipe()
        self.stdout: IO[bytes] = os.fdopen(read, "rb")
        files = DupFd(write), DupFd(stderr.fileno())
        self._process = _FORKS.Process(target=_run, args=(list(arguments), *files))
        self._process.start()
        os.close(write)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _run(arguments: list[str], *files: Any) -> None:
    from ferry.cli import main

    os.setsid()
    for number, file in enumerate(files, 1):
        os.dup2(file.detach(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.exit(main(arguments))
