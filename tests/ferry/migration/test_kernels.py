"""What `send` and `receive` say of the kernels before they begin."""

import json
from collections.abc import Awaitable, Callable
from functools import partial
from types import ModuleType

import pytest
import trio

from ferry.commands import receive, send
from ferry.errors import Exit, Interrupted
from ferry.migration import kernels, receive_options, send_options
from ferry.migration.stop_request import StopRequest
from ferry.progress import Reporter
from transport.kernels.declare import CompilationFailed
from transport.kernels.load import WarmUp


def said(capsys: pytest.CaptureFixture[str], done: WarmUp, *, compiles: bool) -> list[str]:
    def warm_up(compiling: Callable[[], None]) -> WarmUp:
        if compiles:
            compiling()
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "warm_up_all", warm_up)
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


COMMANDS = [
    pytest.param(
        send,
        partial(send.send, send_options.Options(to="ipc:///x", gateway=("/x",), qmp="/x")),
        id="send",
    ),
    pytest.param(
        receive,
        partial(
            receive.receive, receive_options.Options(listen="ipc:///x", gateway=("/x",), qmp="/x")
        ),
        id="receive",
    ),
]


@pytest.mark.parametrize(("module", "command"), COMMANDS)
def test_nothing_is_begun_before_the_kernels_are_ready(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, command: Callable[..., Awaitable[Exit]]
) -> None:
    """A compilation would otherwise count against the deadline of a phase."""

    async def fail(_reporter: Reporter) -> None:
        raise CompilationFailed("no compiler")

    monkeypatch.setattr(module, "make_kernels_ready", fail)
    with pytest.raises(CompilationFailed):  # and not that there is no gateway
        trio.run(command, Reporter("test", as_json=True))


@pytest.mark.parametrize(("module", "command"), COMMANDS)
def test_a_compilation_can_be_interrupted(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, command: Callable[..., Awaitable[Exit]]
) -> None:
    async def compile_for_ever(_reporter: Reporter) -> None:
        stop.ask("enough")
        await trio.sleep_forever()

    stop = StopRequest()
    monkeypatch.setattr(module, "make_kernels_ready", compile_for_ever)
    with pytest.raises(Interrupted, match="enough"):
        trio.run(command, Reporter("test", as_json=True), stop)
