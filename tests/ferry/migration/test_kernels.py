"""What `send` and `receive` say of the kernels before they begin."""

import json
from collections.abc import Callable

import pytest
import trio

from ferry.migration import kernels
from ferry.progress import Reporter
from transport.kernels.load import WarmUp


def said(capsys: pytest.CaptureFixture[str], done: WarmUp, *, compiles: bool) -> list[str]:
    def warm_up(compiling: Callable[[], None]) -> WarmUp:
        if compiles:
            compiling()
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "warm_up", warm_up)
        trio.run(kernels.make_kernels_ready, Reporter("send", as_json=True))
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def test_kernels_that_are_found_are_not_worth_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert not said(capsys, WarmUp(0.4, 14, True, ""), compiles=False)


def test_a_compilation_is_told_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = said(capsys, WarmUp(11.94, 14, False, ""), compiles=True)
    assert before.startswith("compiling the data plane's numba kernels")
    assert after == "the numba kernels are compiled, in 11.9 s"


def test_why_they_cannot_be_kept_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    _, after = said(capsys, WarmUp(12.0, 14, False, "/home: closed"), compiles=True)
    assert after.endswith("they cannot be kept, so every start compiles them: /home: closed")
