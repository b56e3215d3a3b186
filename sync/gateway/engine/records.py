"""What became of each migration that a gateway took part in: one record for each session.

Sans-IO: `Records` keeps them, `keep` puts each change where it survives the gateway
(`records_file`). Not owned: when a fate changes (`custody`).

    source   leaving --> released --> moved | kept | vouched        leaving --> kept
    target   standby --> owned --> about-to-run --> running         standby | owned --> fenced

`moved`, `kept`, `vouched`, `running` and `fenced` are final. What a gateway that ended left under
way is settled when its records are read again (`SETTLED_BY_END`): a guest that was never let go of
is kept, and one that was not about to run never will. One that was let go of stays so.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

MAX_RECORDS = 4096
"""Sessions remembered; session identities are random and do not recur."""


class Fate(StrEnum):
    """What became of a session here, as far as this gateway knows."""

    LEAVING = "leaving"
    """The guest is being moved away and belongs to this side."""
    RELEASED = "released"
    """Let go of; whether the target took it only the target can say."""
    MOVED = "moved"
    """The target has it: the commit was answered, or the target's verdict says so."""
    KEPT = "kept"
    """The guest belongs to this side: it was never let go of, or the target will never start it."""
    VOUCHED = "vouched"
    """Taken back on an operator's word that it runs nowhere else."""
    STANDBY = "standby"
    """A guest is awaited."""
    OWNED = "owned"
    """The commit has come; nothing of the guest has run here."""
    ABOUT_TO_RUN = "about-to-run"
    """Written before anything of the guest runs here: from now on it may have."""
    RUNNING = "running"
    """The guest was set running here."""
    FENCED = "fenced"
    """It has never run here and never will."""


UNSETTLED = frozenset({Fate.LEAVING, Fate.RELEASED, Fate.STANDBY, Fate.OWNED, Fate.ABOUT_TO_RUN})
SETTLED_BY_END = {
    Fate.LEAVING: Fate.KEPT,
    Fate.STANDBY: Fate.FENCED,
    Fate.OWNED: Fate.FENCED,
}
"""By the end of the gateway, or of its VMM's connection."""
FENCED, COMMITTED = "fenced", "committed"
"""The words of a verdict."""
SPOKEN = {
    Fate.FENCED: FENCED,
    Fate.KEPT: FENCED,
    Fate.ABOUT_TO_RUN: COMMITTED,
    Fate.RUNNING: COMMITTED,
    Fate.MOVED: COMMITTED,
}
"""What a fate proves about the session: a source's that of its target."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What both sides of a session agree on before anything is touched. `fenced` and `committed`
    are random words that only they know: who says one of them has the verdict from a record."""

    decides: bool = True
    """Whether this gateway's record is the one that counts, of the VM's several gateways."""
    fenced: str = ""
    committed: str = ""

    def token(self, verdict: str) -> str:
        """The word that proves `verdict`, or ''."""
        return {FENCED: self.fenced, COMMITTED: self.committed}.get(verdict, "")


NO_TERMS = Terms()
"""Nothing is proven to anybody in such a session."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session's record. `began` and `changed` are seconds since the epoch."""

    session: str
    role: str
    fate: Fate
    terms: Terms
    began: float
    changed: float
    ran: bool = True
    """Whether the guest ran until it was paused for the session: else it is left as it is (I12)."""

    @property
    def proof(self) -> str:
        """`VERDICT:SESSION:TOKEN`, where this record decides and its fate proves something."""
        verdict = SPOKEN.get(self.fate, "")
        token = self.terms.token(verdict) if self.terms.decides else ""
        return f"{verdict}:{self.session}:{token}" if token else ""

    def proved(self, proof: str) -> str:
        """The verdict that `proof` proves for this session: a word, or '' if it proves nothing."""
        verdict, _, rest = proof.partition(":")
        token = self.terms.token(verdict)
        return verdict if token and rest == f"{self.session}:{token}" else ""


class Records:
    """`keep` writes a record down and raises if it cannot; `clock` gives seconds since the epoch.

    `kept` are the records of an earlier life of the gateway, every version of each, in order.
    """

    def __init__(
        self,
        clock: Callable[[], float] = lambda: 0.0,
        keep: Callable[[SessionRecord], None] = lambda record: None,
        kept: Iterable[SessionRecord] = (),
    ) -> None:
        self._clock = clock
        self._keep = keep
        self._by_session: OrderedDict[str, SessionRecord] = OrderedDict()
        self.away = ""
        """The session in which the guest was let go of that has not come back since, or ''."""
        for record in kept:
            self._take(record)
        for record in list(self._by_session.values()):
            self.end(record.session)

    def find(self, session: str) -> SessionRecord | None:
        return self._by_session.get(session)

    def fate(self, session: str) -> Fate | None:
        record = self._by_session.get(session)
        return record.fate if record else None

    def latest(self, count: int) -> list[SessionRecord]:
        """The last ones that changed, the latest last."""
        return list(self._by_session.values())[-count:]

    def in_doubt(self) -> SessionRecord | None:
        """The one that somebody may ask about: the latest that is not settled, else the latest."""
        records = list(reversed(self._by_session.values()))
        return next((each for each in records if each.fate in UNSETTLED), next(iter(records), None))

    def begin(self, session: str, role: str, fate: Fate, terms: Terms) -> None:
        """Writes the first record of a session. Raises what `keep` does."""
        now = self._clock()
        self._write(SessionRecord(session, role, fate, terms, now, now))

    def settle(self, session: str, fate: Fate, *, ran: bool = True) -> None:
        """Writes what became of a session that has a record, and that its guest did not run.
        Raises what `keep` does."""
        record = self._by_session[session]
        ran = ran and record.ran
        if record.fate is not fate or record.ran is not ran:
            self._write(replace(record, fate=fate, changed=self._clock(), ran=ran))

    def end(self, session: str) -> None:
        """The gateway's life, or that of the VMM's connection, has ended in this session. Never
        raises: what is not written down is settled alike when the records are read again."""
        record = self._by_session.get(session)
        if record is not None and record.fate in SETTLED_BY_END:
            self.settle_at_least_here(session, SETTLED_BY_END[record.fate])

    def settle_at_least_here(self, session: str, fate: Fate) -> None:
        """`settle`, where reading the older record again leads to the same or a safer end."""
        try:
            self.settle(session, fate)
        except OSError:
            self._take(replace(self._by_session[session], fate=fate, changed=self._clock()))

    def _write(self, record: SessionRecord) -> None:
        self._keep(record)
        self._take(record)

    def _take(self, record: SessionRecord) -> None:
        session, fate = record.session, record.fate
        self._by_session[session] = record
        self._by_session.move_to_end(session)
        if fate is Fate.RELEASED:
            self.away = session
        elif fate in (Fate.ABOUT_TO_RUN, Fate.RUNNING) or (
            fate in (Fate.KEPT, Fate.VOUCHED) and session == self.away
        ):
            self.away = ""
        if len(self._by_session) > MAX_RECORDS:
            self._forget()

    def _forget(self) -> None:
        """Drops the oldest one that is settled: what is in doubt, or away, may still be asked for,
        however many a sender has had refused since."""
        settled = (
            each.session
            for each in self._by_session.values()
            if each.fate not in UNSETTLED and each.session != self.away
        )
        del self._by_session[next(settled, next(iter(self._by_session)))]
