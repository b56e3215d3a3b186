"""How `send` and `receive` end: the exit code, and what the user is told of it."""

from ferry.errors import Exit
from ferry.exit_codes import describe, exit_code_of
from ferry.migration.handover_runner import HandoverRunner
from ferry.progress import Reporter, complain
from sync.handover.states import HandoverState

_EXIT_OF_STATE = {
    HandoverState.IN_DOUBT: Exit.IN_DOUBT,
    HandoverState.BROKEN: Exit.BROKEN,
    HandoverState.OWNER_FAILED: Exit.OWNER_FAILED,
}


def conclude(
    reporter: Reporter,
    state: HandoverState,
    runner: HandoverRunner,
    advice: dict[HandoverState, str],
) -> Exit:
    """The exit code for a terminal `state`. Tells the user what went wrong and what to do: `advice`
    has a sentence for each state that needs one."""
    if state in (HandoverState.COMMITTED, HandoverState.CHECKED):
        return Exit.OK
    error = runner.first_error
    reason = describe(error) if error is not None else "no reason is known"
    if runner.cleanup_error not in (None, error):
        reason += f"; then {describe(runner.cleanup_error)}"
    if not reason.endswith((".", "?")):
        reason += "."
    hint = advice.get(state, "")
    if draft := getattr(error, "draft", ""):
        complain(draft)
        hint = f"A draft to start from is on standard error. {hint}"
    code = _EXIT_OF_STATE.get(state)
    if code is None:
        code = exit_code_of(error) if error is not None else Exit.INTERNAL
    reporter.event(
        "error",
        message=f"{reason} {hint}".strip(),
        state=state.value,
        exit_code=int(code),
        exit_name=code.name.lower(),
    )
    return code
