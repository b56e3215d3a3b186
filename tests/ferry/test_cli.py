"""The command line as a user meets it: help, exit codes, no traceback."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ferry.cli import COMMANDS, main
from ferry.config import flag_of
from ferry.errors import Exit
from ferry.progress import Reporter
from ferry.versions import FORMATS
from transport.wire import records


def ferry(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ferry.cli", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "--config" in capsys.readouterr().out


def test_exit_codes_are_all_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exit-codes"]) == Exit.OK
    printed = capsys.readouterr().out
    for code in Exit:
        assert f"{code.value:>3}  {code.name.lower():<14} {code.meaning}" in printed


@pytest.mark.parametrize("arguments", [["exit-codes"], ["bench", "list"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_nobody_takes(arguments: list[str], buffered: bool) -> None:
    # As users have it, all that is printed is still in a buffer when the command ends, if it is not
    # too much for one.
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    read_end, write_end = os.pipe()
    os.close(read_end)
    for output, says in (
        (write_end, ""),
        (os.open("/dev/full", os.O_WRONLY), f"vfio-ferry {arguments[0]}: No space left on device"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ferry.cli", *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
        os.close(output)
        assert (done.returncode, done.stderr.strip()) == (Exit.LOCAL, says)


def test_output_that_is_closed() -> None:
    for closed in (">&-", ">&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" -m ferry.cli exit-codes {closed}', sys.executable],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (Exit.OK, "", "")


def test_events_that_nobody_takes_are_no_reason_to_stop(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Path("/dev/full").open("w") as full:
        reporter = Reporter("send", as_json=True, stream=full)
        for _ in range(3):
            reporter.event("message", text="x")
    told = capfd.readouterr().err
    assert told == "vfio-ferry send: goes on without output: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["send", "--to", "here", "--qmp", "q"], Exit.USAGE, "an endpoint like"),
        (["send", "--to", "tcp://127.0.0.1:1", "--qmp", "q"], Exit.USAGE, "--gateway is missing"),
        (["send", "--qmp", "q"], Exit.USAGE, "--to is missing"),
        (
            ["send", "--codec", "zstd:99", "--to", "tcp://h:1", "--qmp", "q"],
            Exit.USAGE,
            "auto, zstd:LEVEL with a level",
        ),
        (["receive", "--listen", "tcp://127.0.0.1:0", "--qmp", "q"], Exit.USAGE, "--gateway"),
        (
            ["send", "--downtime-limit", "0", "--to", "tcp://h:1", "--qmp", "q"],
            Exit.USAGE,
            "milliseconds",
        ),
        (["secret", "--identity", "/none/i", "--host", "two words"], Exit.USAGE, "one word"),
        (["gateway", "--control", "/none/c", "--upgrade"], Exit.DEVICE, "c (No such file or dir"),
        (
            ["gateway", "--listen", "l", "--device", "d", "--control", "c", "--journal-size", "1"],
            Exit.USAGE,
            "from 64K to 4G",
        ),
        (
            ["send", "--lanes", "99", "--to", "ipc:///h", "--qmp", "q", "--gateway", "g"],
            Exit.USAGE,
            "1 to 16 are possible",
        ),
        (
            ["send", "--to", "tcp://h:1", "--qmp", "q", "--gateway", "g"],
            Exit.USAGE,
            "is an address of a network",
        ),
        (["send", "--bandwidth", "0", "--to", "tcp://h:1", "--qmp", "q"], Exit.USAGE, "100M"),
        (["send", "--to", "tcp://h:65536", "--qmp", "q"], Exit.USAGE, "an endpoint like"),
        (["send", "--to", "ipc://here", "--qmp", "q"], Exit.USAGE, "an endpoint like"),
        (
            ["send", "--to", "tcp://h:1", "--qmp", "q", "--break-at", "x"],
            Exit.USAGE,
            "one of idle, ",
        ),
        (["device", "--socket", "/none/s", "--image", "/none/i"], Exit.LOCAL, "/none/i"),
        (["device", "--socket", "s", "--image", "i", "--logging", "5"], Exit.USAGE, "4K to 2M"),
        (["device", "--socket", "/none/s", "--image", __file__], Exit.LOCAL, "/none/s"),
        (["guest", "--device", "d", "--qmp", "/none/q"], Exit.LOCAL, "/none/q"),
        (["guest", "--device", "d", "--qmp", "q", "--low-size", "3"], Exit.USAGE, "whole pages"),
        (
            ["gateway", "--listen", "/none/g", "--device", "d", "--control", "c"],
            Exit.LOCAL,
            "/none/g",
        ),
        (["doctor", "--profile", "/none/p"], Exit.USAGE, "from /none/p"),
        (["bench", "run", "pages", "--set", "mib=0"], Exit.USAGE, "mib='0'"),
        (["bench", "run", "link", "--set", "lanes=17"], Exit.USAGE, "from 1 to 16"),
        (["bench", "run", "pages", "--out", "/none/o"], Exit.LOCAL, "/none/o"),
    ],
)
def test_wrong_use_is_told_without_a_traceback(
    arguments: list[str], code: Exit, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # What is found by parsing needs no process of its own.
    if code == Exit.USAGE:
        assert main(arguments) == code
        told = capsys.readouterr().err
    else:
        done = ferry(*arguments)
        assert done.returncode == code
        told = done.stderr
    assert says in told
    assert "Traceback" not in told


def test_a_gateway_that_is_not_there(tmp_path: Path) -> None:
    nothing = str(tmp_path / "none")
    done = ferry(
        *("send", "--to", "tcp://127.0.0.1:1", "--qmp", nothing, "--gateway", nothing),
    )
    assert done.returncode == Exit.DEVICE
    assert "no gateway answers" in done.stdout + done.stderr
    assert "is it running? Nothing was touched.\n" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    nothing = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ferry.cli", "send", "--to", "tcp://127.0.0.1:1"),
            *("--qmp", nothing, "--gateway", nothing),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": ""},
        check=False,
    )
    assert done.returncode == Exit.DEVICE
    assert f"no gateway answers at {tmp_path}/\\udcff" in done.stdout
    assert "Traceback" not in done.stderr


def test_how_long_a_gateway_polls_has_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gateway", "--listen", "l", "--device", "d", "--control", "c"]
    assert main([*words, "--busy-poll", "1001"]) == Exit.USAGE
    assert "at most 1000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["send", "--json", "--bandwith", "1M"], "did you mean --bandwidth?"),
        (["send", "--json", "--qmp", "q"], "--to is missing"),
        (["sned", "--json"], "invalid choice: 'sned'"),
    ],
)
def test_wrong_use_is_an_event_too(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == Exit.USAGE
    printed = capsys.readouterr()
    (event,) = map(json.loads, printed.out.splitlines())
    assert says in event["message"] and says in printed.err
    assert (event["event"], event["exit_code"], event["exit_name"]) == ("error", 2, "usage")


def test_the_version_names_all_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == Exit.OK
    first, *formats = capsys.readouterr().out.splitlines()
    assert first.startswith("vfio-ferry ")
    assert len(formats) == len(FORMATS)
    assert f"{records.PROTOCOL_VERSION:>4}  session: " in formats[0]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completions_know_every_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == Exit.OK
    printed = capsys.readouterr().out
    assert "--downtime-limit" in printed and "--journal-size" in printed


def test_the_manual_page_has_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man"]) == Exit.OK
    printed = capsys.readouterr().out
    plain = printed.replace("\\-", "-")
    for name, command in COMMANDS.items():
        assert f".SS {name}\n" in plain
        for field in dataclasses.fields(importlib.import_module(command.module).Options):
            assert flag_of(field) in plain
    if shutil.which("man"):
        done = subprocess.run(
            ["man", "--warnings", "-l", "-"],
            input=printed,
            env=os.environ | {"LC_ALL": "C", "MANWIDTH": "100"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "--downtime-limit" in done.stdout
