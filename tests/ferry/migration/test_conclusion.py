"""How a migration's end is told."""

import io
from types import SimpleNamespace
from typing import Any

import pytest

from ferry.errors import Exit
from ferry.migration.conclusion import conclude
from ferry.progress import Reporter
from sync.handover.states import HandoverState
from sync.registers.errors import NoMethod

ADVICE = {HandoverState.ABORTED: "The guest stays where it is."}


def test_a_draft_is_for_itself_and_no_sentence_is_glued_to_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    draft = "draft = true\n# the last line\n"
    runner: Any = SimpleNamespace(
        first_error=NoMethod("no profile knows it", draft), cleanup_error=None
    )
    out = io.StringIO()
    reporter = Reporter("send", as_json=False, stream=out)
    assert conclude(reporter, HandoverState.ABORTED, runner, ADVICE) is not Exit.OK
    assert out.getvalue().partition(" ")[2] == (
        "error: no profile knows it. A draft to start from is on standard error. "
        "The guest stays where it is.\n"
    )
    assert capsys.readouterr().err.strip() == draft.strip()
