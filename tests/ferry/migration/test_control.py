"""The control socket of `send`: what may be asked, what may be changed, and who may ask."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.cli import main
from ferry.errors import ConfigError, Exit, LocalError
from ferry.migration.control import Steering, answer, ask, changed, control_socket, settings
from ferry.migration.send_options import Options

OPTIONS = Options(to="ipc:///x", qmp="q")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path


def sockets(folder: Path) -> list[Path]:
    return [*folder.rglob("*.sock")]


def steering(said: list[Any]) -> Steering:
    def change(wanted: dict[str, Any]) -> dict[str, Any]:
        said.append(wanted)
        return settings(changed(OPTIONS, wanted))

    return Steering(
        lambda: {"phase": "precopy", "detail": "d", "progress": None, "settings": {"x": 1}},
        lambda: said.append("cancel"),
        change,
    )


def test_what_can_be_changed() -> None:
    new = changed(OPTIONS, {"bandwidth": "800Mbit/s", "downtime_limit": "40", "on_stall": "abort"})
    assert (new.bandwidth, new.downtime_limit, new.on_stall) == (10**8, 40, "abort")
    assert changed(new, {"bandwidth": "none"}).bandwidth is None


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"bandwidth": "100Mb"}, "--bandwidth is '100Mb'"),
        ({"downtime_limit": 0}, "--downtime-limit is 0"),
        ({"on_stall": "wait"}, "switch or abort"),
        ({"lanes": "3"}, "--lanes cannot be changed"),
    ],
)
def test_what_makes_no_sense_is_refused(wanted: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        changed(OPTIONS, wanted)


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"x", b"[]", b"{}", b'{"do": "end"}', b'{"do": "set"}', b"\xff", b'{"do": []}'),
        b"[" * 60_000,
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_request_that_makes_no_sense_changes_nothing(line: bytes) -> None:
    said: list[Any] = []
    assert answer(line, steering(said))["ok"] is False
    assert not said


@pytest.mark.parametrize("given", [False, True])
def test_the_commands_reach_it(
    runtime: Path, capsys: pytest.CaptureFixture[str], given: bool
) -> None:
    said: list[Any] = []
    path = str(runtime / "here.sock") if given else None
    flags = ["--control-socket", path, "--json"] if path else ["--json"]

    async def body() -> None:
        async with control_socket(path, steering(said)):
            (found,) = sockets(runtime)
            assert stat.S_IMODE(found.stat().st_mode) == 0o600
            if not given:
                assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
            for words in (["status"], ["set", "--bandwidth", "2M"], ["cancel"]):
                assert await trio.to_thread.run_sync(main, [*words, *flags]) == Exit.OK
            assert await trio.to_thread.run_sync(main, ["set", *flags]) == Exit.USAGE

    trio.run(body)
    assert said == [{"bandwidth": "2M"}, "cancel"]
    first, second, *_ = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["event"], first["phase"], first["settings"]) == ("status", "precopy", {"x": 1})
    assert "bandwidth 2.0 MiB/s, downtime limit" in second["text"]
    assert not sockets(runtime)
    with pytest.raises(LocalError, match="no `send`"):
        ask(path, {"do": "status"})


def test_a_folder_where_others_may_write_is_not_used(runtime: Path) -> None:
    (runtime / "open").mkdir()
    (runtime / "open").chmod(0o777)

    async def body() -> None:
        async with control_socket(str(runtime / "open" / "s"), steering([])):
            raise AssertionError

    with pytest.raises(LocalError, match="others may write"):
        trio.run(body)


def test_without_a_place_of_its_own_a_migration_goes_on(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "none"))

    async def body() -> None:
        async with control_socket(None, steering([])):
            assert not sockets(runtime)

    trio.run(body)
