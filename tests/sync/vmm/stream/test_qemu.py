"""Real streams: a guest moves with its stream opened, and its memory is the same on both sides."""

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.qemu.environment import Environment
from tests.sync.vmm.stream.machines import (
    DEADLINE_S,
    MIB,
    SPECS,
    Spec,
    assert_equal,
    assert_nonzero_announced,
    fill,
    migrate,
    running,
    until,
)
from tests.sync.vmm.stream.reading import every, new_reader, read, read_or_close, take_all
from tests.sync.vmm.stream.streams import parse

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(400)]

BY_DEFAULT = "q35-vga"
SMALL = Spec(backends=(64 * MIB,))
RETURN_PATH_ENDS = bytes([0, 1, 0, 4, 0, 0, 0, 0])
"""The target's last word, for which a QEMU with a return path waits: all is loaded."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == BY_DEFAULT else [pytest.mark.full]) for name in SPECS],
)
def test_a_guest_moves(environment: Environment, short_path: Path, name: str) -> None:
    spec = SPECS[name]
    if spec.huge and _free_huge_bytes() < 2 * sum(spec.backends):
        pytest.skip("there are not enough free hugepages")
    target_args = ("-incoming", "defer")
    with (
        running(environment.qemu, short_path / "a", spec) as source,
        running(environment.qemu, short_path / "b", spec, *target_args) as target,
    ):
        fill(source, seed=1)
        move = migrate(source, target, short_path)
        assert_equal(source, target)
        assert_nonzero_announced(source, move)
    assert move.mapped == {f"ram{number}" for number in range(len(spec.backends))}
    assert not move.carried
    assert move.announced.all()
    assert move.n_passed_on < 2 * MIB


@pytest.mark.full
def test_a_guest_that_boots_goes_on(
    environment: Environment, initramfs: Path, short_path: Path
) -> None:
    """Linux writes its memory while it is sent, and comes up at the target."""
    spec = replace(SPECS["q35"], runs=True)

    def arguments(host: str) -> tuple[str, ...]:
        serial = (f"file:{short_path}/{host}.console", f"file:{short_path}/{host}.report")
        return (
            *("-kernel", str(environment.kernel), "-initrd", str(initramfs)),
            *("-append", "console=ttyS0 ferry.workload=idle ferry.poweroff=0"),
            *(word for path in serial for word in ("-serial", path)),
        )

    with (
        running(environment.qemu, short_path / "a", spec, *arguments("a")) as source,
        running(
            environment.qemu, short_path / "b", spec, *arguments("b"), "-incoming", "defer"
        ) as target,
    ):
        until(lambda: b"Memory: " in (short_path / "a.console").read_bytes())
        move = migrate(source, target, short_path)
        assert move.mapped == {"ram0"}
        assert move.n_pages > move.announced.sum()
        assert move.n_pass_ends >= 1
        assert_equal(source, target)
        assert_nonzero_announced(source, move)
        target.qmp("cont")
        until(lambda: b"beat" in (short_path / "b.report").read_bytes())


@pytest.fixture
def stream(environment: Environment, short_path: Path, request: pytest.FixtureRequest) -> bytes:
    """What a paused QEMU with these capabilities sends on its main channel."""
    with running(environment.qemu, short_path / "a", SMALL) as source:
        fill(source, seed=1, n_pages=40)
        capabilities = [{"capability": name, "state": True} for name in request.param]
        source.qmp("migrate-set-capabilities", capabilities=capabilities)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(short_path / "out"))
            listener.listen()
            listener.settimeout(DEADLINE_S)
            source.qmp("migrate", uri=f"unix:{short_path}/out")
            connection = listener.accept()[0]
            with connection:
                connection.settimeout(DEADLINE_S)
                if {"return-path", "postcopy-ram"} & set(request.param):
                    connection.sendall(RETURN_PATH_ENDS)
                return b"".join(_received(connection))


def _received(connection: socket.socket) -> Iterator[bytes]:
    while data := connection.recv(1 << 20):
        yield data


@pytest.mark.full
@pytest.mark.parametrize(
    "stream", [(), ("xbzrle",), ("return-path",), ("events", "auto-converge")], indirect=True
)
def test_capabilities_that_change_nothing(stream: bytes) -> None:
    """However the stream is cut, what it says is the same."""
    written = parse(stream)
    outcomes = [
        read(new_reader(tail_bytes=MIB), every(stream, n_bytes), take_all)
        for n_bytes in (37, 4099, 1 << 20)
    ]
    for outcome in outcomes:
        assert len(outcome.announced) == len(written.records)
        assert parse(bytes(outcome.passed_on)).tail == written.tail
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.full
@pytest.mark.parametrize("stream", [("postcopy-ram",), ("x-ignore-shared",)], indirect=True)
def test_capabilities_that_close_the_stream(stream: bytes) -> None:
    outcome, error = read_or_close(new_reader(), every(stream, 1 << 16), take_all)
    assert error
    assert outcome.passed_on == stream


def _free_huge_bytes() -> int:
    found = re.search(r"^HugePages_Free:\s*(\d+)$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 2 * MIB if found else 0
