"""Children end with the process that has started them, however it ends, and not before."""

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.children import start_child

DEADLINE_S = 60.0
ROOM = Path(__file__).parents[2]
STARTER = """
import os, threading, time
from pathlib import Path
from lab.children import start_child
asker = []
def start():
    asker.append(threading.get_native_id())
    child = start_child(["sleep", "600"])
    # Not before the child is what it is to be would it hear of the end of a thread.
    while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\\n":
        time.sleep(0.01)
    print(child.pid, flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
while Path(f"/proc/self/task/{asker[0]}").exists():
    time.sleep(0.01)
print("gone", flush=True)
input()
"""
DYING_S = 0.2
"""Time for a child to die that was sent SIGKILL: more is not needed, less would only see less."""


def test_a_child_outlives_the_thread_that_asked_for_it_and_dies_with_the_process() -> None:
    with start_python("-c", STARTER) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        assert starter.stdout.readline() == b"gone\n"
        # Whoever is told by the death of a thread was told before that is gone.
        descriptor = os.pidfd_open(child)
        assert select.select([descriptor], [], [], DYING_S)[0] == []
        os.close(descriptor)
        starter.kill()
    wait_until(lambda: not runs(child), "the child goes on")


def test_it_is_started_behind_a_prefix() -> None:
    with start_child(
        ["sh", "-c", "echo $NAME"], prefix=["env", "NAME=value"], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.read() == b"value\n"
        assert isinstance(child.args, list)
        assert child.args[:2] == ["env", "NAME=value"]


def test_a_command_that_is_not_there() -> None:
    threads = threading.active_count()
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        start_child(["no-such-command"])
    assert threading.active_count() == threads


def test_a_demonstration_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with start_python("-m", "ferry.cli", "demo", "--folder", str(folder)) as demo:
        assert demo.stdout is not None
        while b"the guest runs on host a" not in demo.stdout.readline():
            assert demo.poll() is None
        assert len(processes_of(folder)) > 6
        demo.kill()
    wait_until(lambda: not processes_of(folder), "processes go on")


def start_python(*arguments: str) -> "subprocess.Popen[bytes]":
    return start_child(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOM), "PYTHONUNBUFFERED": "1"},
    )


def processes_of(folder: Path) -> list[str]:
    """Those that were told of the folder."""
    return [entry.name for entry in Path("/proc").iterdir() if str(folder) in words_of(entry.name)]


def words_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)
