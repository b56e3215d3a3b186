"""Which message may come when: the table against the protocol as it is written down by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.migration.conversation import Conversation
from ferry.migration.messages import MessageKind
from sync.handover.machine import TABLES, RemoteProtocolError
from sync.handover.states import HandoverState, Role

ORACLE = {
    "target": {
        "PROBE": ("answering", "aborted", 5),
        "STATE": ("receiving", "fencing aborted broken", 1_000_000),
        "PLATFORM": ("receiving", "fencing aborted broken", 1),
        "ASK_LOADED": ("receiving", "fencing aborted broken", 1),
        "ASK": ("receiving", "fencing aborted broken", 1),
        "COMMIT": ("ready", "fencing aborted broken", 1),
        "ABORT": (
            "checking checking-only answering entering-standby receiving readying ready",
            "fencing aborted broken in-doubt checked",
            1,
        ),
    },
    "source": {
        "LOADED": ("finalizing", "aborting aborted broken", 1),
        "READY": ("awaiting-ready", "aborting aborted broken", 1),
        "COMMITTED": ("committing", "in-doubt", 1),
        "WATCHED": ("committed", "in-doubt", 1),
        "START_FAILED": ("committing", "in-doubt", 1),
        "ABORT": (
            "preparing mediating precopy pausing stopping finalizing verifying awaiting-ready "
            "releasing committing",
            "aborting aborted broken in-doubt checked",
            1,
        ),
    },
}
"""By hearer and message: where it is acted on, where it is ignored, how often it may come."""

STATES = {role: list(TABLES[role]) for role in Role}


def expected(role: Role, kind: int, state: HandoverState, heard_before: int) -> str:
    """What has to become of a message: `acts`, `ignores` or `breaks`."""
    name = next((each.name for each in MessageKind if each == kind), "")
    acts, ignores, at_most = ORACLE[role.value].get(name, ("", "", 0))
    if heard_before >= at_most:
        return "breaks"
    if state.value in acts.split():
        return "acts"
    return "ignores" if state.value in ignores.split() else "breaks"


def outcome(conversation: Conversation, kind: int, state: HandoverState) -> str:
    try:
        message = conversation.take(kind, state)
    except RemoteProtocolError:
        return "breaks"
    if message is None:
        return "ignores"
    assert message == kind
    return "acts"


@pytest.mark.parametrize("kind", [*MessageKind, 0, 13, 200])
@pytest.mark.parametrize(
    ("role", "state"), [(role, state) for role in Role for state in STATES[role]]
)
def test_i9_each_message_in_each_state(role: Role, state: HandoverState, kind: int) -> None:
    assert outcome(Conversation(role), kind, state) == expected(role, kind, state, 0)


@given(st.data(), st.sampled_from(Role))
def test_i9_any_messages_in_any_order(data: st.DataObject, role: Role) -> None:
    """What breaks the protocol ends the session, so nothing is asked of what would follow it."""
    conversation = Conversation(role)
    heard: list[int] = []
    kinds = st.sampled_from(MessageKind)
    for kind, state in data.draw(
        st.lists(st.tuples(kinds, st.sampled_from(STATES[role])), max_size=30)
    ):
        wanted = expected(role, kind, state, heard.count(kind))
        assert outcome(conversation, kind, state) == wanted
        if wanted == "breaks":
            break
        heard.append(kind)


def test_every_message_has_a_hearer() -> None:
    assert {name for rules in ORACLE.values() for name in rules} == set(MessageKind.__members__)


def test_the_error_names_the_message_and_the_state() -> None:
    conversation = Conversation(Role.TARGET)
    conversation.take(MessageKind.ASK_LOADED, HandoverState.RECEIVING)
    with pytest.raises(RemoteProtocolError, match="ASK_LOADED more than 1 time"):
        conversation.take(MessageKind.ASK_LOADED, HandoverState.RECEIVING)
    with pytest.raises(RemoteProtocolError, match="COMMIT to a target that is receiving"):
        conversation.take(MessageKind.COMMIT, HandoverState.RECEIVING)
    with pytest.raises(RemoteProtocolError, match="kind 200, which a target"):
        conversation.take(200, HandoverState.RECEIVING)
