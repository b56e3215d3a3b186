"""The state machine of device migration (v2): which arcs exist and which way leads where.

Pure tables; a device executes the arcs, and reports the outcome as its own state.
Source: vfio-user specification, "Direct State Transitions" and "Complex State Transitions".

              STOP_COPY <------ PRE_COPY
                 | ^               | ^
                 v |               v |
    RESUMING <-> STOP <---------> RUNNING          ERROR: left by DEVICE_RESET only, to RUNNING
"""

from collections.abc import Mapping
from typing import Final

from sync.errors import SyncError
from sync.vfio_user.features import MigrationState

_STOP: Final = MigrationState.STOP
_RUNNING: Final = MigrationState.RUNNING
_STOP_COPY: Final = MigrationState.STOP_COPY
_RESUMING: Final = MigrationState.RESUMING
_PRE_COPY: Final = MigrationState.PRE_COPY

SAVING_GROUP: Final = frozenset({_STOP_COPY, _PRE_COPY})
"""States in which migration data can be read; never passed through on the way to another state."""

ARCS: Final = frozenset(
    {
        (_RUNNING, _STOP),
        (_STOP_COPY, _STOP),
        (_RESUMING, _STOP),
        (_PRE_COPY, _RUNNING),
        (_STOP, _RUNNING),
        (_RUNNING, _PRE_COPY),
        (_STOP, _STOP_COPY),
        (_PRE_COPY, _STOP_COPY),
        (_STOP, _RESUMING),
    }
)
"""Transitions that a device executes in one step."""

NEXT_HOP: Final[Mapping[MigrationState, Mapping[MigrationState, MigrationState]]] = {
    _STOP: {
        _RUNNING: _RUNNING,
        _STOP_COPY: _STOP_COPY,
        _RESUMING: _RESUMING,
        _PRE_COPY: _RUNNING,
    },
    _RUNNING: {
        _STOP: _STOP,
        _STOP_COPY: _STOP,
        _RESUMING: _STOP,
        _PRE_COPY: _PRE_COPY,
    },
    _STOP_COPY: {
        _STOP: _STOP,
        _RUNNING: _STOP,
        _RESUMING: _STOP,
    },
    _RESUMING: {
        _STOP: _STOP,
        _RUNNING: _STOP,
        _STOP_COPY: _STOP,
        _PRE_COPY: _STOP,
    },
    _PRE_COPY: {
        _STOP: _RUNNING,
        _RUNNING: _RUNNING,
        _STOP_COPY: _STOP_COPY,
        _RESUMING: _RUNNING,
    },
}
"""`NEXT_HOP[current][target]`: the first step of the way; a pair that is missing is not allowed."""


class IllegalTransition(SyncError):
    """The device cannot go from this state to that one; a request for it is refused (EINVAL)."""


def next_hop(
    current: MigrationState, target: MigrationState, *, pre_copy: bool = True
) -> MigrationState:
    """Return the state to go to first on the way from `current` to a different `target`.

    `pre_copy` tells whether the device supports PRE_COPY.
    Raises `IllegalTransition` if the specification has no way.
    """
    hop = NEXT_HOP.get(current, {}).get(target)
    if hop is None or (not pre_copy and _PRE_COPY in (current, target)):
        raise IllegalTransition(f"no way from {current.name} to {target.name}")
    return hop


def path(
    current: MigrationState, target: MigrationState, *, pre_copy: bool = True
) -> tuple[MigrationState, ...]:
    """Return the states from behind `current` up to `target`; empty if the device is there.

    Raises `IllegalTransition` if the specification has no way.
    """
    states = []
    while current != target:
        current = next_hop(current, target, pre_copy=pre_copy)
        states.append(current)
    return tuple(states)
