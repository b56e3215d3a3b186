"""The custody of a guest, against a model written from the rules and not from the table."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync.gateway.control.requests import REQUESTS
from sync.gateway.engine.custody import (
    LEASE_LOSS,
    TRANSITIONS,
    ClientRole,
    Custody,
    CustodyState,
    LeaseLoss,
    Owner,
)
from sync.gateway.errors import GatewayError, NoVmm, SessionFenced, WrongSession, WrongState

SESSIONS = ("a", "b")
STEPS = [
    *(("vmm_came",), ("lost",), ("mediate",), ("stop",), ("restore",), ("start",), ("abandon",)),
    *itertools.product(("release", "reclaim", "standby", "own", "fence"), SESSIONS),
]


class Model:
    """What each step needs and does, said in other words. None: it is refused."""

    def __init__(self) -> None:
        self.where = "passthrough"
        self.owner = "unowned"
        self.session = ""
        self.vmm = False
        self.fenced: set[str] = set()
        self.owned: set[str] = set()

    def step(self, name: str, session: str = "") -> bool:
        allowed = getattr(self, f"_{name}")(session)
        return bool(allowed)

    def _vmm_came(self, _: str) -> bool:
        self.vmm = True
        if self.where == "passthrough":
            self.owner, self.session = "owned", ""
        return True

    def _lost(self, _: str) -> bool:
        if self.where == "standby" and self.owner != "owned":
            self.fenced.add(self.session)
        self.where, self.owner, self.vmm = "passthrough", "unowned", False
        return True

    def _mediate(self, _: str) -> bool:
        if not (self.where == "passthrough" and self.owner == "owned" and self.vmm):
            return False
        self.where = "mediated"
        return True

    def _stop(self, _: str) -> bool:
        if self.where != "mediated":
            return False
        self.where = "stopped"
        return True

    def _restore(self, _: str) -> bool:
        if self.where not in ("passthrough", "mediated", "stopped"):
            return False
        self.where = "passthrough"
        return True

    def _release(self, session: str) -> bool:
        if self.where == "released":
            return session == self.session
        if self.where != "stopped":
            return False
        self.where, self.owner, self.session = "released", "released", session
        return True

    def _reclaim(self, session: str) -> bool:
        if self.where != "released" or session != self.session:
            return False
        self.where, self.owner = "stopped", "owned"
        return True

    def _standby(self, session: str) -> bool:
        if self.where != "passthrough" or session in self.fenced | self.owned:
            return False
        self.where, self.owner, self.session = "standby", "unowned", session
        return True

    def _own(self, session: str) -> bool:
        if self.where != "standby" or session != self.session or session in self.fenced:
            return False
        self.owner = "owned"
        self.owned.add(session)
        return True

    def _start(self, _: str) -> bool:
        if self.where != "standby" or self.owner != "owned" or not self.vmm:
            return False
        self.where = "passthrough"
        return True

    def _fence(self, session: str) -> bool:
        if session in self.owned:
            return False
        self.fenced.add(session)
        if self.where == "standby" and session == self.session:
            self.owner = "fenced"
        return True

    def _abandon(self, _: str) -> bool:
        if self.where == "passthrough":
            return True
        if self.where != "standby" or self.owner == "owned":
            return False
        self.where, self.owner = "passthrough", "fenced"
        self.fenced.add(self.session)
        return True


@given(st.lists(st.sampled_from(STEPS), max_size=40))
@settings(max_examples=300, deadline=None)
def test_custody_does_what_the_rules_say(steps: list[tuple[str, ...]]) -> None:
    custody, model = Custody(), Model()
    for name, *arguments in steps:
        before = (custody.state, custody.owner, custody.session)
        expected = model.step(name, *arguments)
        try:
            getattr(custody, name)(*arguments)
        except GatewayError:
            assert not expected
            assert (custody.state, custody.owner, custody.session) == before
        else:
            assert expected
        assert custody.state == model.where
        assert custody.owner == model.owner
        assert custody.session == model.session


@given(st.lists(st.sampled_from(STEPS), max_size=60))
@settings(max_examples=300, deadline=None)
def test_i7_a_session_is_never_both_fenced_and_owned(steps: list[tuple[str, ...]]) -> None:
    """Whatever is asked for in whatever order: one final verdict for a session, and a guest that
    was released runs here again only through `reclaim` by its session, or a new VMM."""
    custody = Custody()
    settled: dict[str, str] = {}
    for name, *arguments in steps:
        was_released = custody.owner is Owner.RELEASED
        session = custody.session
        try:
            getattr(custody, name)(*arguments)
        except GatewayError:
            continue
        for who, verdict in custody.verdicts(10).items():
            assert settled.setdefault(who, verdict) == verdict
        if was_released and custody.owner is not Owner.RELEASED:
            assert (name, *arguments) in {("reclaim", session), ("lost",)}


def test_i7_a_fenced_session_is_refused_from_then_on() -> None:
    custody = Custody()
    custody.fence("a")
    with pytest.raises(SessionFenced):
        custody.standby("a")
    custody.standby("b")
    custody.fence("b")
    with pytest.raises(SessionFenced):
        custody.own("b")
    assert custody.owner is Owner.FENCED


def test_i7_a_vmm_that_comes_to_a_standby_does_not_own_the_guest() -> None:
    custody = Custody()
    custody.standby("a")
    custody.vmm_came()
    assert custody.owner is Owner.UNOWNED
    with pytest.raises(WrongState):
        custody.start()


def test_the_commit_can_be_repeated_because_its_answer_may_be_lost() -> None:
    custody = Custody()
    custody.vmm_came()
    custody.standby("a")
    custody.own("a")
    custody.own("a")
    custody.start()
    assert (custody.owner, custody.session) == (Owner.OWNED, "a")
    with pytest.raises(WrongState):
        custody.fence("a")


def test_the_errors_tell_the_reason() -> None:
    custody = Custody()
    with pytest.raises(NoVmm):
        custody.mediate()
    custody.vmm_came()
    custody.mediate()
    custody.stop()
    custody.release("a")
    with pytest.raises(WrongSession):
        custody.reclaim("b")
    with pytest.raises(WrongState):
        custody.restore()


def test_i7_losing_the_lease_never_touches_a_released_or_committed_guest() -> None:
    assert not {key for key in LEASE_LOSS if key[1] is CustodyState.RELEASED}
    custody = Custody()
    custody.standby("a")
    assert custody.on_lease_loss(ClientRole.TARGET) is LeaseLoss.ABANDON
    custody.own("a")
    assert custody.on_lease_loss(ClientRole.TARGET) is LeaseLoss.NOTHING
    for state in CustodyState:
        custody.state = state
        assert custody.on_lease_loss(ClientRole.OBSERVER) is LeaseLoss.NOTHING


def test_every_transition_can_be_asked_for_where_it_begins() -> None:
    for state, event in TRANSITIONS:
        request = REQUESTS[event.value]
        assert state in request.states
        assert ClientRole.OBSERVER not in request.roles


def test_every_state_leads_back_to_passthrough() -> None:
    """By the source's own requests, or the target's: nobody is stuck."""
    for state in CustodyState:
        reached = {state}
        for _ in CustodyState:
            reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
        assert CustodyState.PASSTHROUGH in reached
