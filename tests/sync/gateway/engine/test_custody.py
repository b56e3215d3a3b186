"""The custody of a guest, against a model written from the rules and not from the table."""

import itertools
from contextlib import suppress

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
from sync.gateway.engine.records import Fate, Records, Terms
from sync.gateway.errors import (
    GatewayError,
    NotRecorded,
    NoVmm,
    SessionFenced,
    WrongSession,
    WrongState,
)

SESSIONS = ("a", "b")
WORDS = ("", "fenced", "committed", "nonsense")
TERMS = Terms(True, "F", "C")
STEPS = [
    *(("vmm_came",), ("lost",), ("stop",), ("restore",), ("start",), ("abandon",), ("restarted",)),
    *itertools.product(("mediate", "release", "standby", "own", "fence", "vouch"), SESSIONS),
    *itertools.product(("reclaim", "moved"), SESSIONS, WORDS),
]


def proof_of(word: str, session: str) -> str | None:
    return f"{word}:{session}:{TERMS.token(word)}" if word else None


def act(custody: Custody, name: str, session: str = "", word: str = "") -> Custody:
    """Takes a step; the custody from then on. The gateway may be killed and started anew."""
    if name == "restarted":
        return Custody(Records(kept=custody.records.latest(10**6)))
    if name in ("reclaim", "moved"):
        getattr(custody, name)(session, proof_of(word, session))
    elif name in ("mediate", "standby"):
        getattr(custody, name)(session, TERMS)
    elif session:
        getattr(custody, name)(session)
    else:
        getattr(custody, name)()
    return custody


class Model:
    """What each step needs and does, said in other words. False: it is refused."""

    def __init__(self) -> None:
        self.where = "passthrough"
        self.owner = "unowned"
        self.session = ""
        self.vmm = False
        self.had_guest = False
        self.away = ""
        self.fates: dict[str, str] = {}
        self.sources: set[str] = set()

    def step(self, name: str, session: str = "", word: str = "") -> bool:
        if name in ("reclaim", "moved"):
            return bool(getattr(self, f"_{name}")(session, word))
        return bool(getattr(self, f"_{name}")(session))

    def _rest(self) -> None:
        self.where = "released" if self.away else "passthrough"
        self.owner = "released" if self.away else "unowned"
        self.session = self.away or self.session

    def _vmm_came(self, _: str) -> bool:
        self.vmm = True
        if self.where == "passthrough":
            self.owner, self.session = "owned", ""
        return True

    def _end(self, session: str) -> None:
        ends = {"leaving": "kept", "standby": "fenced", "owned": "fenced"}
        if session in self.fates:
            self.fates[session] = ends.get(self.fates[session], self.fates[session])

    def _lost(self, _: str) -> bool:
        self._end(self.session)
        self.vmm = self.had_guest = False
        self._rest()
        return True

    def _restarted(self, _: str) -> bool:
        for session in self.fates:
            self._end(session)
        self.vmm = self.had_guest = False
        self.session = ""
        self._rest()
        return True

    def _mediate(self, session: str) -> bool:
        if not (self.where == "passthrough" and self.owner == "owned" and self.vmm):
            return False
        if session in self.fates:
            return False
        self.where, self.session, self.fates[session] = "mediated", session, "leaving"
        self.sources.add(session)
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
        self._end(self.session)
        return True

    def _release(self, session: str) -> bool:
        if self.where == "released":
            return session == self.session
        if self.where != "stopped" or self.fates.get(session, "leaving") != "leaving":
            return False
        self.where, self.owner, self.session = "released", "released", session
        self.fates[session], self.away, self.had_guest = "released", session, True
        self.sources.add(session)
        return True

    def _back(self, fate: str) -> bool:
        self.fates[self.session], self.away, self.had_guest = fate, "", False
        self.where, self.owner = "stopped", "owned"
        if not self.vmm:
            self._rest()
        return True

    def _reclaim(self, session: str, word: str) -> bool:
        if self.where != "released" or session != self.session:
            return False
        if self.fates[session] == "moved" or word not in ("", "fenced"):
            return False
        return self._back("kept")

    def _vouch(self, session: str) -> bool:
        return self.where == "released" and session == self.session and self._back("vouched")

    def _moved(self, session: str, word: str) -> bool:
        if self.fates.get(session) == "moved":
            return True
        if self.fates.get(session) != "released" or word not in ("", "committed"):
            return False
        self.fates[session] = "moved"
        return True

    def _standby(self, session: str) -> bool:
        if self.where not in ("passthrough", "released") or self.had_guest:
            return False
        if session in self.fates:
            return False
        self.where, self.owner, self.session = "standby", "unowned", session
        self.fates[session] = "standby"
        return True

    def _own(self, session: str) -> bool:
        if self.where != "standby" or session != self.session:
            return False
        if self.fates[session] not in ("standby", "owned", "about-to-run"):
            return False
        if self.owner != "owned":
            self.fates[session] = "owned"
        self.owner = "owned"
        return True

    def _start(self, _: str) -> bool:
        if self.where != "standby" or self.owner != "owned" or not self.vmm:
            return False
        self.where, self.fates[self.session], self.away = "passthrough", "about-to-run", ""
        return True

    def _fence(self, session: str) -> bool:
        fate = self.fates.get(session)
        if session in self.sources or fate == "about-to-run":
            return False
        self.fates[session] = "fenced"
        if self.where == "standby" and session == self.session:
            self.owner = "fenced"
        return True

    def _abandon(self, _: str) -> bool:
        if self.where == "passthrough":
            return True
        if self.where != "standby" or self.owner == "owned":
            return False
        self.where, self.owner = "passthrough", "fenced"
        self.fates[self.session] = "fenced"
        if self.away:
            self._rest()
        return True


@given(st.lists(st.sampled_from(STEPS), max_size=40))
@settings(max_examples=500, deadline=None)
def test_custody_does_what_the_rules_say(steps: list[tuple[str, ...]]) -> None:
    custody, model = Custody(), Model()
    for step in steps:
        before = (custody.state, custody.owner, custody.session, custody.records.latest(9))
        expected = model.step(*step)
        try:
            custody = act(custody, *step)
        except GatewayError:
            assert not expected
            after = (custody.state, custody.owner, custody.session, custody.records.latest(9))
            assert after == before
        else:
            assert expected
        assert custody.state == model.where
        assert custody.owner == model.owner
        assert custody.session == model.session
        assert {each.session: each.fate for each in custody.records.latest(9)} == model.fates
        assert custody.records.away == model.away


FINAL = {"moved": {"vouched"}, "kept": (), "vouched": (), "fenced": (), "about-to-run": ()}
"""What may follow a fate that is final: only an operator's word."""


@given(st.lists(st.sampled_from(STEPS), max_size=60))
@settings(max_examples=300, deadline=None)
def test_i7_a_verdict_is_final_and_a_guest_that_left_is_back_by_a_proof_alone(
    steps: list[tuple[str, ...]],
) -> None:
    """Whatever is asked for in whatever order, by whomever, across deaths of the gateway: nobody
    owns a guest here that was let go of, unless that was undone, or a guest has arrived."""
    custody = Custody()
    settled: dict[str, str] = {}
    for step in steps:
        away = custody.records.away
        with suppress(GatewayError):
            custody = act(custody, *step)
        for record in custody.records.latest(9):
            if record.session in settled:
                was = settled[record.session]
                assert record.fate == was or record.fate in FINAL[was]
            if record.fate in FINAL:
                settled[record.session] = record.fate
        if away and not custody.records.away:
            back = ("reclaim", away, "fenced"), ("reclaim", away, ""), ("vouch", away), ("start",)
            assert step in back
        if custody.records.away:
            arriving = custody.state is CustodyState.STANDBY
            assert custody.shut or arriving


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
    assert custody.records.fate("a") is Fate.ABOUT_TO_RUN
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


def test_i7_a_commit_whose_vmm_is_lost_before_it_may_run_is_void() -> None:
    custody = Custody()
    custody.vmm_came()
    custody.standby("a", TERMS)
    custody.own("a")
    custody.lost()
    assert custody.record("").proof == "fenced:a:F"
    custody.vmm_came()
    with pytest.raises(SessionFenced):
        custody.standby("a")


def test_i7_a_guest_that_was_about_to_run_is_never_fenced_whatever_becomes_of_its_vmm() -> None:
    custody = Custody()
    custody.vmm_came()
    custody.standby("a", TERMS)
    custody.own("a")
    custody.about_to_run()
    custody.lost()
    with pytest.raises(WrongState):
        custody.fence("a")
    assert custody.record("a").proof == "committed:a:C"


def test_i7_what_cannot_be_recorded_does_not_hold() -> None:
    full = False

    def keep(record: object) -> None:
        if full:
            raise OSError(28, "No space left on device")

    custody = Custody(Records(keep=keep))
    custody.vmm_came()
    custody.mediate("a", TERMS)
    custody.stop()
    full = True
    with pytest.raises(NotRecorded):
        custody.release("a")
    assert (custody.state, custody.owner) == (CustodyState.STOPPED, Owner.OWNED)
    custody.restore()
    assert custody.records.fate("a") is Fate.KEPT


def test_i7_a_gateway_that_does_not_decide_proves_nothing() -> None:
    custody = Custody()
    custody.vmm_came()
    custody.standby("a", Terms(False, "F", "C"))
    custody.own("a")
    assert not custody.record("a").proof
    custody.lost()
    assert not custody.record("a").proof
