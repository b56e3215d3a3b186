"""Child processes that end with this one, also when this one is killed.

For whoever starts gateways, devices and VMMs for a while: the demonstrations, the tests, the
benchmarks. Started by a user those commands live on without their starter.

The kernel sends such a child SIGKILL when the *thread* that has started it ends (PR_SET_PDEATHSIG
of prctl(2), here by way of setpriv(1)), and trio's threads, for one, end when they have had nothing
to do for a while. So all of them are started by one thread, which stays as long as the process.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_starter = ThreadPoolExecutor(1, "child-starter")


def start_child(
    command: Sequence[str | Path], *, prefix: Sequence[str] = (), **options: Any
) -> "subprocess.Popen[Any]":
    """`command` behind `prefix`, a command that runs another one; `options` are those of `Popen`,
    and so are the errors. What has to outlive this process is started by `Popen` itself."""
    if shutil.which(command[0]) is None:
        # Or it would be setpriv that says so, in a process that seems to have started.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(command[0]))
    words = [*prefix, *_die_with_parent(), *command]
    return _starter.submit(lambda: subprocess.Popen(words, **options)).result()


def _die_with_parent() -> tuple[str, ...]:
    """The words by which setpriv(1) has a command end with its parent; none where there is no
    setpriv, for that is a convenience."""
    return ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
