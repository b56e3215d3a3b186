"""What `send` and `receive` may say to each other, and when: one table, which both listeners obey.

Owns what may be said, when and how often. Does no I/O: a listener feeds it with the kind of each
message and the state of its own side of the handover, and acts on what comes back. What a message
means stands in `ferry.migration.messages`.

Messages arrive in the order in which they were sent, but the sender may not have known yet that
this side had given up: what it said before is legal and ignored (`Rule.ignored_in`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ferry.migration.messages import PROBES, MessageKind
from sync.handover.machine import TABLES, Event, RemoteProtocolError
from sync.handover.states import HandoverState, Role


@dataclass(frozen=True, slots=True)
class Rule:
    """When a message may come; in any other state it breaks the protocol."""

    heard_in: frozenset[HandoverState]
    """The states of the hearer in which the message is acted on."""
    ignored_in: frozenset[HandoverState]
    """The states in which it may come and nothing is done: the hearer has given up meanwhile."""
    at_most: int | None = 1
    """How often it may come in one session; None: as often as the transport's window lets it."""


_K, _S = MessageKind, HandoverState

_SOURCE_GAVE_UP = (_S.ABORTING, _S.ABORTED, _S.BROKEN)
_TARGET_GAVE_UP = (_S.FENCING, _S.ABORTED, _S.BROKEN)


def _rule(
    state: HandoverState, ignored_in: Iterable[HandoverState], at_most: int | None = 1
) -> Rule:
    return Rule(frozenset({state}), frozenset(ignored_in), at_most)


def _rule_of(role: Role, event: Event) -> Rule:
    """The rule of a message that is an event of the handover, made from the handover's table."""
    rows = {state: row[event] for state, row in TABLES[role].items() if event in row}
    idle = {state for state, does in rows.items() if does.state is state and not does.actions}
    return Rule(frozenset(rows.keys() - idle), frozenset(idle))


EVENTS: Mapping[Role, Mapping[MessageKind, Event]] = {
    Role.SOURCE: {
        _K.READY: Event.PEER_READY,
        _K.COMMITTED: Event.PEER_COMMITTED,
        _K.START_FAILED: Event.PEER_START_FAILED,
        _K.ABORT: Event.PEER_ABORTED,
    },
    Role.TARGET: {
        _K.ASK: Event.PEER_ASKS,
        _K.COMMIT: Event.PEER_COMMIT,
        _K.ABORT: Event.PEER_ABORTED,
    },
}
"""By hearer: the messages that are events of the handover."""

RULES: Mapping[Role, Mapping[MessageKind, Rule]] = {
    Role.SOURCE: {
        _K.LOADED: _rule(_S.FINALIZING, _SOURCE_GAVE_UP),
        _K.WATCHED: _rule(_S.COMMITTED, {_S.IN_DOUBT}),
        **{kind: _rule_of(Role.SOURCE, event) for kind, event in EVENTS[Role.SOURCE].items()},
    },
    Role.TARGET: {
        _K.PROBE: _rule(_S.ANSWERING, {_S.ABORTED}, PROBES),
        _K.STATE: _rule(_S.RECEIVING, _TARGET_GAVE_UP, None),
        _K.PLATFORM: _rule(_S.RECEIVING, _TARGET_GAVE_UP),
        _K.ASK_LOADED: _rule(_S.RECEIVING, _TARGET_GAVE_UP),
        **{kind: _rule_of(Role.TARGET, event) for kind, event in EVENTS[Role.TARGET].items()},
    },
}
"""By hearer: the messages that it may be told, and when. What is not here may not be said to it."""


class Conversation:
    """Keeps count of what a side of this `role` has been told in one session."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._rules = RULES[role]
        self._heard: Counter[MessageKind] = Counter()

    def take(self, kind: int, state: HandoverState) -> MessageKind | None:
        """The message of this number that came in `state`, or None if nothing is to be done.

        Raises `RemoteProtocolError` for a kind that nobody knows or that is not for this side, and
        for one that `state` does not allow or that came too often.
        """
        try:
            message = MessageKind(kind)
            rule = self._rules[message]
        except (ValueError, KeyError):
            raise RemoteProtocolError(
                f"the peer sent a message of kind {kind}, which a {self._role.value} is never sent"
            ) from None
        if state not in rule.heard_in | rule.ignored_in:
            raise RemoteProtocolError(
                f"the peer sent {message.name} to a {self._role.value} that is {state.value}"
            )
        self._heard[message] += 1
        if rule.at_most is not None and self._heard[message] > rule.at_most:
            raise RemoteProtocolError(
                f"the peer sent {message.name} more than {rule.at_most} times"
            )
        return message if state in rule.heard_in else None
