"""The migration state machine against the specification's rule, worked out anew here."""

import itertools

import pytest

from lab.vfio_user.migration_arcs import ARCS, NEXT_HOP, IllegalTransition, next_hop, path
from sync.vfio_user.features import MigrationState as S

# "Direct State Transitions", one line for each bullet of the specification.
SPECIFIED_ARCS = {
    (S.RUNNING, S.STOP),
    (S.STOP_COPY, S.STOP),
    (S.RESUMING, S.STOP),
    (S.PRE_COPY, S.RUNNING),
    (S.STOP, S.RUNNING),
    (S.RUNNING, S.PRE_COPY),
    (S.STOP, S.STOP_COPY),
    (S.PRE_COPY, S.STOP_COPY),
    (S.STOP, S.RESUMING),
}
SAVING = {S.STOP_COPY, S.PRE_COPY}


def shortest_paths(current: S, target: S, pre_copy: bool) -> list[tuple[S, ...]]:
    """Every shortest path by the specification's rule, found by trying all simple paths."""
    if S.ERROR in (current, target) or (current, target) == (S.STOP_COPY, S.PRE_COPY):
        return []
    arcs = {arc for arc in SPECIFIED_ARCS if pre_copy or S.PRE_COPY not in arc}
    for length in range(1, len(S)):
        found = [
            tail
            for tail in itertools.product(S, repeat=length)
            if tail[-1] == target
            and all(arc in arcs for arc in itertools.pairwise((current, *tail)))
            and not SAVING & set(tail[:-1])
        ]
        if found:
            return found
    return []


@pytest.mark.parametrize("pre_copy", [True, False])
@pytest.mark.parametrize(("current", "target"), list(itertools.permutations(S, 2)))
def test_every_pair_of_states_takes_the_only_shortest_path(
    current: S, target: S, pre_copy: bool
) -> None:
    expected = shortest_paths(current, target, pre_copy)
    if not expected:
        with pytest.raises(IllegalTransition):
            path(current, target, pre_copy=pre_copy)
        with pytest.raises(IllegalTransition):
            next_hop(current, target, pre_copy=pre_copy)
    else:
        assert [path(current, target, pre_copy=pre_copy)] == expected
        assert next_hop(current, target, pre_copy=pre_copy) == expected[0][0]


@pytest.mark.parametrize("state", S)
def test_a_device_that_is_there_has_nothing_to_do(state: S) -> None:
    assert path(state, state) == ()


def test_the_tables_hold_nothing_beside_the_specified_arcs() -> None:
    assert ARCS == SPECIFIED_ARCS
    hops = {(state, hop) for state, row in NEXT_HOP.items() for hop in row.values()}
    assert hops == SPECIFIED_ARCS
