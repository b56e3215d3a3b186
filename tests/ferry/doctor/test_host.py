"""What `doctor` says of this host, where something is missing that every test machine has."""

import platform

import pytest

from ferry.doctor import host
from ferry.doctor.host import _kernels
from ferry.findings import Level
from transport.kernels import clib
from transport.kernels.load import WarmUp


def test_a_c_library_that_cannot_be_called_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [finding.check for finding in _kernels()] == ["C libraries", "kernels"]
    load = clib.load_library
    monkeypatch.setattr(clib, "load_library", lambda module: load(module + "_of_another_kind"))
    (finding,) = _kernels()
    assert finding.check == "C libraries"
    assert "of_another_kind cannot be loaded" in finding.text
    assert "lz4>=4.3" in finding.text


@pytest.mark.parametrize(
    ("done", "level", "said"),
    [
        (WarmUp(0.42, 14, True, ""), Level.OK, "14 numba kernels, found in the cache in 0.4 s"),
        (WarmUp(11.9, 14, False, ""), Level.OK, "14 numba kernels compiled in 11.9 s; from now on"),
        (WarmUp(11.9, 14, False, "closed"), Level.NOTE, "cannot be kept"),
    ],
)
def test_what_became_of_the_kernels_is_told(
    monkeypatch: pytest.MonkeyPatch, done: WarmUp, level: Level, said: str
) -> None:
    monkeypatch.setattr(host, "warm_up_all", lambda: done)
    _, finding = _kernels()
    assert finding.level is level
    assert said in finding.text


@pytest.mark.parametrize(("machine", "level"), [("x86_64", Level.OK), ("aarch64", Level.NOTE)])
def test_another_processor_is_no_problem_but_untested(
    monkeypatch: pytest.MonkeyPatch, machine: str, level: Level
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert host._machine().level is level
