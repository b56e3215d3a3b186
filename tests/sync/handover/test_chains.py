"""Chains of migrations over three hosts, with what dies and what an operator may do in between.

The gateways' custody is the real one; migrations, VMMs and operators are modelled here. The oracle
knows one thing only: who wrote to the disk. Each migration makes a copy of the guest, numbered by
its session; a copy may write while it runs and its gateway lets it. Once a copy has written, an
older one must never write again. And if no VMM has died, the documented procedure leaves a guest
that runs.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sync.gateway.engine.custody import ClientRole, Custody, CustodyState, LeaseLoss, Owner
from sync.gateway.engine.records import Fate, Records, SessionRecord, Terms
from sync.gateway.errors import GatewayError
from sync.handover.states import Role

SOURCE, TARGET = Role.SOURCE, Role.TARGET
ROUTES = {1: ["ab"], 2: ["bc", "ac", "ba"], 3: ["ca", "cb", "ab", "bc"]}
"""By the number of the session: from where to where it may go."""


@dataclass(frozen=True)
class Host:
    """`copy`: the number of the guest's copy in its VMM; None: it waits for one, or is dead."""

    custody: Custody
    copy: int | None = None
    runs: bool = False
    vmm: bool = True

    @property
    def key(self) -> object:
        c = self.custody
        record = (c.state, c.owner, c.session, c.vmm_connected, c.holds_copy, c.records.away)
        return (*record, tuple(c.records.latest(9)), self.copy, self.runs, self.vmm)

    @property
    def writes(self) -> bool:
        """Whether the guest can have its device write to the disk."""
        c = self.custody
        here = c.state in (CustodyState.PASSTHROUGH, CustodyState.MEDIATED)
        return self.runs and here and c.owner is Owner.OWNED and c.vmm_connected


@dataclass(frozen=True)
class Migration:
    """`step` counts what both sides have done; `alive` are the commands that still run."""

    session: int
    source: str
    target: str
    step: int = 0
    alive: frozenset[Role] = frozenset(Role)


@dataclass(frozen=True)
class World:
    hosts: dict[str, Host]
    migration: Migration | None = None
    n_sessions: int = 0
    wrote: int = 0
    """The latest copy that was able to write."""
    faults: frozenset[str] = field(default_factory=frozenset)
    """What has gone wrong, beside commands that were killed: each of it once."""

    @property
    def key(self) -> object:
        hosts = tuple(self.hosts[name].key for name in "abc")
        return (hosts, self.migration, self.n_sessions, self.wrote, self.faults)

    def with_host(self, name: str, act: Callable[[Custody], object], **changes: Any) -> "World":
        host = self.hosts[name]
        custody = _clone(host.custody)
        act(custody)
        return replace(self, hosts={**self.hosts, name: replace(host, custody=custody, **changes)})


def _clone(custody: Custody) -> Custody:
    other = object.__new__(Custody)
    other.__dict__.update(custody.__dict__)
    records = object.__new__(Records)
    records.__dict__.update(custody.records.__dict__)
    records.__dict__["_by_session"] = custody.records.__dict__["_by_session"].copy()
    other.records = records
    return other


def begin() -> World:
    hosts = {name: Host(Custody()) for name in "abc"}
    for host in hosts.values():
        host.custody.vmm_came()
    return World({**hosts, "a": replace(hosts["a"], copy=0, runs=True)})


def terms_of(session: int) -> Terms:
    return Terms(True, f"F{session}", f"C{session}")


# --- one migration, step by step ---


def steps_of(world: World) -> Iterator[World]:
    """The next step of the migration, and the death of either command."""
    migration = world.migration
    assert migration is not None
    with suppress(GatewayError):
        after = _advance(world, migration)
        if after is not None:
            yield after
    for role in migration.alive:
        yield _killed(world, migration, role)


STEPS: list[Role] = [TARGET, SOURCE, SOURCE, SOURCE, SOURCE, TARGET, TARGET, TARGET, SOURCE]
"""Who takes it: standby, mediate, pause, release, commit is sent; own, start, cont, answer."""


def _advance(world: World, migration: Migration) -> World | None:
    source, target, step = migration.source, migration.target, migration.step
    session = str(migration.session)
    if step == len(STEPS):
        return replace(world, migration=None)
    # Until the commit is sent both are needed; afterwards either goes on by itself.
    if STEPS[step] not in migration.alive or (step <= 4 and len(migration.alive) < 2):
        return replace(world, migration=None) if not migration.alive else None
    terms = terms_of(migration.session)
    if step == 0:
        world = world.with_host(target, lambda c: c.standby(session, terms))
    elif step == 1:
        world = world.with_host(source, lambda c: c.mediate(session, terms))
    elif step == 2:
        if not world.hosts[target].vmm:
            return None
        world = world.with_host(source, lambda c: c.stop(), runs=False)
        world = world.with_host(target, lambda c: None, copy=migration.session)
    elif step == 3:
        world = world.with_host(source, lambda c: c.release(session))
    elif step == 5:
        world = world.with_host(target, lambda c: c.own(session))
    elif step == 6:
        world = world.with_host(target, lambda c: c.start())
    elif step == 7:
        if not world.hosts[target].vmm:
            return None
        world = world.with_host(target, lambda c: c.running(session), runs=True)
    elif step == 8:
        if SOURCE not in migration.alive or TARGET not in migration.alive:
            return None
        world = world.with_host(source, lambda c: c.moved(session))
    return replace(world, migration=replace(migration, step=step + 1))


def _killed(world: World, migration: Migration, role: Role) -> World:
    """A command dies: its gateway does what it does by itself."""
    name = migration.source if role is SOURCE else migration.target
    world = _lease_lost(world, name, ClientRole(role.value))
    alive = migration.alive - {role}
    return replace(world, migration=replace(migration, alive=alive) if alive else None)


def _lease_lost(world: World, name: str, role: ClientRole) -> World:
    host = world.hosts[name]
    action = host.custody.on_lease_loss(role)
    if action is LeaseLoss.ABANDON:
        return world.with_host(name, lambda c: c.abandon())
    if action is LeaseLoss.RESTORE:
        return world.with_host(name, lambda c: c.restore(), runs=host.vmm and host.copy is not None)
    return world


# --- what goes wrong, and what an operator does ---


def events(world: World, n_sessions: int) -> Iterator[World]:
    if world.migration is not None:
        yield from steps_of(world)
    elif world.n_sessions < n_sessions:
        number = world.n_sessions + 1
        for route in ROUTES[number]:
            source, target = route[0], route[1]
            if world.hosts[source].writes and world.hosts[target].vmm:
                migration = Migration(number, source, target)
                # The target has a new VMM, which waits.
                if world.hosts[target].copy is not None:
                    fresh = world.with_host(target, _new_vmm, copy=None, runs=False)
                else:
                    fresh = world
                yield replace(fresh, migration=migration, n_sessions=number)
    yield from operator(world)
    for name, host in world.hosts.items():
        if "restart" not in world.faults and not _held(world, name):
            yield _fault(world.with_host(name, lambda c: None), name, "restart")
        if "vmm" not in world.faults and host.copy is not None and not _held(world, name):
            yield _fault(world, name, "vmm")


def _held(world: World, name: str) -> bool:
    """Whether a command that lives has the lease of this gateway."""
    migration = world.migration
    if migration is None:
        return False
    return (SOURCE in migration.alive and migration.source == name) or (
        TARGET in migration.alive and migration.target == name
    )


def _new_vmm(custody: Custody) -> None:
    custody.lost()
    custody.vmm_came()


def _fault(world: World, name: str, what: str) -> World:
    world = replace(world, faults=world.faults | {what})
    if what == "vmm":
        return world.with_host(name, lambda c: c.lost(), copy=None, runs=False, vmm=False)
    custody = Custody(Records(kept=_history(world.hosts[name].custody.records)))
    copy = world.hosts[name].copy
    if world.hosts[name].vmm and custody.records.fate(str(copy)) is not Fate.FENCED:
        # It connects anew. QEMU never does: continued by hand, a fenced one has no device.
        custody.vmm_came()
    host = replace(world.hosts[name], custody=custody)
    return replace(world, hosts={**world.hosts, name: host})


def _history(records: Records) -> Iterator[SessionRecord]:
    """As the file has it: where the guest is away, the line that let go of it is there, too."""
    for record in records.latest(99):
        if record.session == records.away:
            yield replace(record, fate=Fate.RELEASED)
        yield record


def proofs(world: World) -> set[str]:
    """All that `resolve` prints anywhere."""
    every = (h.custody.records.latest(9) for h in world.hosts.values())
    return {record.proof for records in every for record in records} - {""}


def operator(world: World) -> Iterator[World]:
    """`resolve` on any host for any session with any proof, and `cont` where it is not due."""
    for name, host in world.hosts.items():
        if _held(world, name):
            continue
        for record in host.custody.records.latest(9):
            for proof in proofs(world):
                with suppress(GatewayError):
                    yield take_back(world, name, record.session, proof)
                with suppress(GatewayError):
                    yield note_moved(world, name, record.session, proof)
            with suppress(GatewayError):
                yield complete(world, name, record.session)
        if host.copy is not None and not host.runs and "cont" not in world.faults:
            after = world.with_host(name, lambda c: None, runs=True)
            yield replace(after, faults=world.faults | {"cont"})


def take_back(world: World, name: str, session: str, proof: str) -> World:
    """`resolve --verdict` on the source."""

    def act(custody: Custody) -> None:
        custody.reclaim(session, proof)
        custody.restore()

    host = world.hosts[name]
    return world.with_host(name, act, runs=host.vmm and host.copy is not None)


def note_moved(world: World, name: str, session: str, proof: str) -> World:
    """The same, with the other verdict."""
    return world.with_host(name, lambda c: c.moved(session, proof))


def complete(world: World, name: str, session: str) -> World:
    """`resolve` on the target: it starts what the commit reached."""
    host = world.hosts[name]
    fate = host.custody.records.fate(session)
    under_way = fate in (Fate.OWNED, Fate.ABOUT_TO_RUN) and host.custody.session in (session, "")
    if not under_way or not host.vmm:
        return world

    def act(custody: Custody) -> None:
        if custody.state is CustodyState.STANDBY:
            custody.start()
        custody.running(session)

    # It is set running only if this is the guest that it holds.
    runs = host.runs or host.copy == int(session)
    return world.with_host(name, act, runs=runs)


def settled(world: World) -> World:
    """The documented procedure, from the first session to the last."""
    for session in map(str, range(1, world.n_sessions + 1)):
        for name in world.hosts:
            world = complete(world, name, session)
        for name in world.hosts:
            for proof in sorted(proofs(world)):
                with suppress(GatewayError):
                    world = take_back(world, name, session, proof)
                with suppress(GatewayError):
                    world = note_moved(world, name, session, proof)
    return world


def explore(n_sessions: int) -> int:
    """Every world that can be reached; how many. Raises AssertionError where the oracle does."""
    seen = set()
    frontier = [begin()]
    while frontier:
        world = frontier.pop()
        if world.key in seen:
            continue
        seen.add(world.key)
        writers = [host.copy for host in world.hosts.values() if host.writes]
        assert len(writers) < 2, "two hosts write to one disk"
        for copy in writers:
            assert copy is not None
            assert copy >= world.wrote, "an older copy writes again"
        latest = max([world.wrote, *(copy for copy in writers if copy is not None)])
        world = replace(world, wrote=latest)
        if world.migration is None and "vmm" not in world.faults:
            assert any(host.writes for host in settled(world).hosts.values()), "a lost guest"
        frontier += events(world, n_sessions)
    return len(seen)


def test_i7_chains_of_two_migrations() -> None:
    assert explore(2) > 1000


@pytest.mark.full
@pytest.mark.timeout(600)
def test_i7_chains_of_three_migrations() -> None:
    assert explore(3) > 10_000


def _believe(custody: Custody, session: str, proof: str | None = None) -> None:
    custody.vouch(session)


def _forget_shut(custody: Custody) -> None:
    custody.vmm_connected = True
    if custody.state in (CustodyState.PASSTHROUGH, CustodyState.RELEASED):
        custody.state, custody.owner, custody.session = CustodyState.PASSTHROUGH, Owner.OWNED, ""


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("reclaim", _believe),
        ("vmm_came", _forget_shut),
        ("about_to_run", lambda custody: custody.check_start()),
    ],
)
def test_i7_the_search_finds_what_is_broken(
    method: str, broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Custody, method, broken)
    with pytest.raises((AssertionError, GatewayError)):
        explore(2)
