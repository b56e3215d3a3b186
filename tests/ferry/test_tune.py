"""`vfio-ferry tune`: what follows from figures, and the command from end to end."""

import argparse
import json
import os
import socket
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry import tune
from ferry.cli import main
from ferry.config import load
from ferry.errors import Exit
from ferry.send import Options as SendOptions
from ferry.tuning import CodecSample, LinkSample, as_toml, choose
from transport.page_costs import LADDER

CODECS = [
    CodecSample("none", 1e-6, 4104),
    CodecSample("lz4", 8e-6, 2300),
    CodecSample("zstd:3", 14e-6, 1480),
    CodecSample("zstd:9", 60e-6, 1390),
]
GIB = 1 << 30


def test_what_gains_little_is_not_taken() -> None:
    links = [
        LinkSample(1, 1 << 20, 60e6),
        LinkSample(2, 1 << 20, 98e6),
        LinkSample(2, 4 << 20, 100e6),
        LinkSample(4, 1 << 20, 101e6),
    ]
    settings = choose(links, CODECS, 2, 8 * GIB)
    assert (settings.lanes, settings.frame_bytes) == (2, 1 << 20)
    assert settings.link_bytes_per_s == 98e6


@pytest.mark.parametrize(
    ("rate", "codec"), [(1e10, "none"), (117e6, "zstd:3"), (1e6, "zstd:9"), (700e6, "lz4")]
)
def test_the_codec_that_suits_the_link(rate: float, codec: str) -> None:
    assert choose([LinkSample(2, 1 << 20, rate)], CODECS, 2, GIB).codec == codec


@given(
    st.lists(
        st.builds(
            LinkSample,
            st.integers(1, 16),
            st.sampled_from([1 << 18, 1 << 20]),
            st.floats(1e3, 1e11),
        ),
        min_size=1,
    ),
    st.integers(1, 64),
    st.integers(0, 1 << 42),
)
def test_send_reads_whatever_is_chosen(links: list[LinkSample], cores: int, memory: int) -> None:
    settings = choose(links, CODECS, cores, memory)
    table = tomllib.loads(as_toml(settings, "a link"))["send"]
    assert table["lanes"] == settings.lanes
    assert 16 << 20 <= table["cache"] <= 256 << 20


def test_tune_writes_a_file_that_send_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "LINK_SETTINGS", ((1, 1 << 18), (2, 1 << 20)))
    monkeypatch.setattr(tune, "ENOUGH_S", 0.001)
    sample, output = tmp_path / "sample", tmp_path / "ferry.toml"
    sample.write_bytes(np.arange(1 << 18, dtype=np.uint32).tobytes())
    arguments = ["tune", "--sample", str(sample), "--output", str(output), "--json"]
    assert main(arguments) == Exit.OK
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["name"] for e in events if e["event"] == "codec"] == [str(c) for c in LADDER]
    assert [e["lanes"] for e in events if e["event"] == "link"] == [1, 2]
    flags = argparse.Namespace(config=str(output), to="tcp://host:7100", qmp="qmp.sock")
    options = load(SendOptions, "send", flags)
    assert options.codec == "auto"
    assert options.lanes in (1, 2)


def test_wrong_use_of_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["tune", "--to", "tcp://h:1", "--listen", "tcp://h:1"]
    assert main(both) == Exit.USAGE
    (tmp_path / "short").write_bytes(b"x")
    assert main(["tune", "--sample", str(tmp_path / "short")]) == Exit.USAGE
    assert main(["tune", "--sample", str(tmp_path / "none")]) == Exit.LOCAL
    assert "less than a page" in capsys.readouterr().err


def test_an_address_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["tune", "--listen", f"tcp://127.0.0.1:{taken.getsockname()[1]}"]) == Exit.LOCAL
    assert "cannot bind" in capsys.readouterr().err


def test_nobody_at_the_other_end(tmp_path: Path) -> None:
    sample = tmp_path / "sample"
    sample.write_bytes(os.urandom(1 << 16))
    nobody = f"ipc://{tmp_path}/none"
    assert main(["tune", "--to", nobody, "--sample", str(sample)]) == Exit.UNREACHABLE
