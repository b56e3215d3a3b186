"""Links between namespaces: they are shaped, carry connections, and end."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from perf import links
from perf.errors import BenchUsageError, NeedMissing
from perf.links import (
    DEVICE,
    SOURCE_ADDRESS,
    TARGET_ADDRESS,
    Link,
    local_link,
    open_link,
    shaped_link,
)

needs_namespaces = pytest.mark.skipif(
    links.missing() is not None, reason=f"no shaped links: {links.missing()}"
)
RATE = 10**9


def output(prefix: tuple[str, ...], *command: str) -> str:
    return subprocess.run([*prefix, *command], capture_output=True, text=True, check=True).stdout


def namespaces(link: Link) -> set[str]:
    here = str(Path("/proc/self/ns/net").readlink())
    return {
        here,
        *(
            output(prefix, "readlink", "/proc/self/ns/net").strip()
            for prefix in (link.source_prefix, link.target_prefix)
        ),
    }


@needs_namespaces
def test_both_ends_are_in_namespaces_of_their_own_and_shaped() -> None:
    with shaped_link(RATE) as link:
        assert link.target_address == TARGET_ADDRESS
        assert len(namespaces(link)) == 3
        for prefix, address in (
            (link.source_prefix, SOURCE_ADDRESS),
            (link.target_prefix, TARGET_ADDRESS),
        ):
            assert f"{address}/24" in output(prefix, "ip", "-4", "address", "show", DEVICE)
            shaping = output(prefix, "tc", "qdisc", "show", "dev", DEVICE)
            assert "tbf" in shaping
            assert "rate 1Gbit" in shaping


@needs_namespaces
def test_a_connection_goes_through() -> None:
    serve = "import socket; s = socket.create_server(('', 7)); print(flush=True); s.accept()"
    connect = f"import socket; socket.create_connection(('{TARGET_ADDRESS}', 7), 10)"
    with shaped_link(None) as link:
        server = [*link.target_prefix, sys.executable, "-c", serve]
        with subprocess.Popen(server, stdout=subprocess.PIPE) as target:
            assert target.stdout is not None
            target.stdout.readline()
            output(link.source_prefix, sys.executable, "-c", connect)
            assert target.wait(10) == 0


@needs_namespaces
def test_nothing_is_left_afterwards() -> None:
    before = _open_namespaces()
    with pytest.raises(KeyboardInterrupt), shaped_link(RATE):
        assert len(_open_namespaces()) > len(before)
        raise KeyboardInterrupt
    # A namespace lives as long as a process is in it, or a descriptor is open.
    assert _open_namespaces() == before
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "unshare" in Path(f"/proc/{pid}/cmdline").read_text()]


def _open_namespaces() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that listed the folder
            found.append(str(entry.readlink()))
    return sorted(name for name in found if name.startswith(("net:", "user:")))


def test_what_the_kernel_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NeedMissing, match="no network namespace"), shaped_link(RATE):
        pass
    assert "no network namespace" in str(links.missing())


def test_links_have_names() -> None:
    with open_link("tcp") as link:
        assert link.url("pages") == "tcp://127.0.0.1:*"
    with open_link("ipc") as link:
        assert link.sockets is not None
        assert link.url("pages") == f"ipc://{link.sockets}/pages"
        assert link.sockets.is_dir()
    assert not link.sockets.exists()


@needs_namespaces
def test_a_number_names_a_rate() -> None:
    with open_link("100") as link:
        assert link.bits_per_s == 10**8
        assert link.url("pages") == f"tcp://{TARGET_ADDRESS}:*"


@pytest.mark.parametrize("text", ["", "udp", "0", "-1", "1e3", "1000@5", "1000@-5ms", "10000000"])
def test_a_link_that_there_is_not_is_named(text: str) -> None:
    with pytest.raises(BenchUsageError, match="there is no link"), open_link(text):
        pass


def test_a_benchmark_at_one_end_has_no_shaped_link() -> None:
    with local_link("ipc") as link:
        assert link.name == "ipc"
    with pytest.raises(BenchUsageError, match="tcp and ipc"), local_link("1000"):
        pass
