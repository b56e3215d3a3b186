"""Options from flags and TOML: the same words for the same mistake, the flag wins."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.config import (
    add_arguments,
    endpoint,
    load,
    milliseconds,
    option,
    positive,
    rate,
    seconds,
    size,
    socket_path,
)
from ferry.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    where: str = option("an address", parse=endpoint)
    room: int = option("bytes", 4096, parse=size)
    times: int = option("how often", 3, parse=positive)
    mode: str = option("how", "fast", choices=("fast", "slow"))
    path: tuple[str, ...] = option("paths", (), repeat=True)
    quiet: bool = option("say less", False)


def parse(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    return load(Options, "thing", parser.parse_args(arguments))


def config(folder: Path, text: str) -> str:
    path = folder / "ferry.toml"
    path.write_text(text)
    return str(path)


def test_defaults_and_flags() -> None:
    options = parse("--where", "tcp://host:7000", "--path", "x", "--path", "y", "--quiet")
    assert options == Options(where="tcp://host:7000", path=("x", "y"), quiet=True)


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        '[thing]\nwhere = "ipc:///run/x"\nroom = "2M"\ntimes = 7\nquiet = true\npath = ["p"]\n',
    )
    assert parse("--config", path, "--times", "9") == Options(
        where="ipc:///run/x", room=2 << 20, times=9, quiet=True, path=("p",)
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[thing]\nwhat = 1\n", "no key 'what'"),
        ('[thing]\nwhere = "nowhere"\n', "an endpoint like"),
        ('[thing]\nwhere = "tcp://h:1"\ntimes = 0\n', "at least 1"),
        ('[thing]\nwhere = "tcp://h:1"\ntimes = true\n', "a string or a number"),
        ('[thing]\nwhere = "tcp://h:1"\nmode = "wild"\n', "one of fast, slow"),
        ('[thing]\nwhere = "tcp://h:1"\nquiet = "yes"\n', "true or false"),
        ('[thing]\nwhere = "tcp://h:1"\npath = [[1]]\n', "a string or a number"),
        ("thing = 3\n", "has to be a table"),
        ("[thing\n", "not valid TOML"),
    ],
)
def test_nonsense_in_a_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse("--config", config(tmp_path, text))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        parse("--config", str(tmp_path / "none.toml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        parse("--config", str(tmp_path / "binary"))


def test_what_is_required_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--where is missing"):
        parse()


def test_what_is_given_twice_is_refused(tmp_path: Path) -> None:
    where = ("--where", "tcp://h:1")
    with pytest.raises(ConfigError, match="--path names 'x' twice"):
        parse(*where, "--path", "x", "--path", "y", "--path", "x")
    path = config(tmp_path, '[thing]\npath = ["x", "x"]\n')
    with pytest.raises(ConfigError, match=r"path in \[thing\] names 'x' twice"):
        parse(*where, "--config", path)


@pytest.mark.parametrize(
    "text", ["tcp://[::1]:7100", "tcp://[fe80::1%eth0]:1", "tcp://host-1.example:7100", "tcp://*:1"]
)
def test_endpoints(text: str) -> None:
    assert endpoint(text) == text


@pytest.mark.parametrize(
    "text", ["tcp://[::1:7100", "tcp://::1:7100", "tcp://[]:1", "tcp://[host]:1", "tcp://u@h:1"]
)
def test_what_is_no_host_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match=r"\[IPV6\]:PORT"):
        endpoint(text)


@pytest.mark.parametrize("text", ["0", "-1", "300ms", "0.3", "3600001", ""])
def test_milliseconds_say_their_unit(text: str) -> None:
    assert milliseconds("300") == 300
    with pytest.raises(ValueError, match="milliseconds, from 1 to 3600000"):
        milliseconds(text)


@given(st.integers(0, 1 << 40), st.sampled_from(["", "K", "M", "G", "k", "KiB", "mB"]))
def test_sizes(number: int, unit: str) -> None:
    factor = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[unit[:1].lower()]
    assert size(f"{number}{unit}") == number * factor


@given(st.text())
def test_parsers_refuse_with_value_error_only(text: str) -> None:
    for parser in (size, rate, positive, seconds, milliseconds, endpoint):
        try:
            parser(text)
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("1000", 1000),
        ("100M", 100 << 20),
        ("100MiB/s", 100 << 20),
        ("2K/s", 2048),
        ("800Mbit/s", 10**8),
        ("8bit/s", 1),
    ],
)
def test_rates_say_their_unit(text: str, bytes_per_s: int) -> None:
    assert rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["100Mb", "100Mb/s", "100Mbit", "0", "0/s", "7bit/s", "1.5G"])
def test_rates_that_could_mean_two_things_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"bytes a second.*800Mbit/s"):
        rate(text)


@pytest.mark.parametrize("text", ["64Kb", "64kib", "1 mb"])
def test_a_small_b_is_no_byte(text: str) -> None:
    with pytest.raises(ValueError, match="steps of 1024"):
        size(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[thng]\nwhere = "tcp://h:1"\n', r"\[thng\] of no command; did you mean 'thing'\?"),
        ("[thing]\ntimse = 1\n", "did you mean 'times'?"),
    ],
)
def test_what_is_misspelt_is_named_with_the_nearest(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse("--config", config(tmp_path, text))


def test_a_file_may_have_the_tables_of_other_commands(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    path = config(tmp_path, '[other]\nx = 1\n[thing]\nwhere = "tcp://h:1"\n')
    assert load(Options, "thing", parser.parse_args(["--config", path]), {"other"}).times == 3


def test_the_path_of_a_socket_is_made_absolute_where_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert socket_path("vm/../qmp.sock") == f"{tmp_path}/qmp.sock"
    assert socket_path("/run/qmp.sock") == "/run/qmp.sock"
    assert socket_path("q" * 107) == "q" * 107, "as it is where it would be too long"
    for text in ("", "/" + "q" * 107):
        with pytest.raises(ValueError, match="path of a socket"):
            socket_path(text)
