"""The migration of a VMM that speaks QMP, as the steps of one side.

Owns the order of QMP commands and how their end is recognised; the device, its gateway and the
network are other people's. Source: QEMU's qapi/migration.json. What state a VMM is in is always
asked of it (`query-status`, `query-migrate`); an event only says when to ask again.

    source                                        target (`-S -incoming defer`)
    check_source         running                  check_target     inmigrate
                                                  start_incoming
    start_outgoing       active, held by a downtime limit of 0
    allow_switchover
    wait_pre_switchover  finish-migrate
    continue_switchover
    wait_completed       postmigrate              wait_loaded      paused
                                                  resume           running
    cancel_and_resume    back to running, from each of these states
"""

import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import trio
from trio.abc import AsyncResource

from sync.vmm.client import COMMAND_DEADLINE_S, QmpClient
from sync.vmm.errors import (
    MigrationFailed,
    QmpProtocolError,
    VmmGone,
    VmmNotReady,
    VmmRefused,
)
from sync.vmm.qmp import QmpEvent
from sync.vmm.settings import (
    SLEEPING_THROTTLE,
    THROTTLE,
    THROTTLE_PARAMETERS,
    MigrationSettings,
    why_closed,
)
from sync.vmm.states import (
    FAILED,
    RUNNING,
    STOPPED,
    UNDER_WAY,
    ResumeStep,
    in_words,
    migration_status_of,
    resume_step,
    run_state_of,
)

POLL_S = 0.05
"""How often a VMM is asked when it sends no event."""
LOADING_POLL_S = 0.005
"""How often one is asked that loads its stream, whose guest stands still meanwhile."""
RECONNECT_S = 2.0
PAUSE_CAPABILITY = "pause-before-switchover"
ANNOUNCEMENT = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
"""When, in milliseconds, and how often: QEMU's own values after a migration."""
MAX_DOWNTIME_MS = 2_000_000
"""QEMU's own limit for downtime-limit."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PreSwitchover:
    """The guest stands still and the VMM waits for `continue_switchover`."""

    guest_paused_at: float
    """When the guest was paused, in seconds since the epoch: from the STOP event, or, if this
    connection did not see one, the moment at which the pause was noticed."""
    waiting_at: float
    """When the VMM began to wait, told in the same way: from then on it waits for us."""


@dataclass(frozen=True, slots=True)
class VmmProgress:
    """What `query-migrate` says. Numbers are 0 where the VMM does not say."""

    status: str
    """`none`, `setup`, `active`, `pre-switchover`, `device`, `completed`, `failed`, ..."""
    transferred_bytes: int
    remaining_bytes: int
    total_bytes: int
    dirty_pages_per_s: int
    rounds: int
    """How often the VMM has read its dirty bitmap."""
    page_bytes: int
    downtime_ms: int
    error: str
    """The VMM's `error-desc`, or empty."""


class Vmm(AsyncResource):
    """One VMM under control. Every method may raise `VmmGone` and `QmpProtocolError`.

    The wait_* methods have no deadline of their own: `trio.fail_after` is for that. All of them
    may be cancelled and called again.
    """

    def __init__(self, client: QmpClient) -> None:
        self.client = client
        self._migration_mark = client.events_seen
        self.guest_was = "running"
        """The guest's last run state that its migration has not brought about."""

    @classmethod
    async def connect(cls, path: str, *, deadline_s: float = 10.0) -> "Vmm":
        """Takes the QMP socket `path`. Raises `VmmGone` when it is not to be had in time."""
        return cls(await QmpClient.connect(path, deadline_s=deadline_s))

    async def aclose(self) -> None:
        """Gives the QMP socket back. The VMM goes on as it is."""
        await self.client.aclose()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        deadline_s: float = COMMAND_DEADLINE_S,
    ) -> Any:
        """Any QMP command. Raises `VmmRefused`, `VmmNotReady` after the deadline."""
        return await self.client.execute(command, arguments, deadline_s=deadline_s)

    async def run_state(self) -> str:
        """`running`, `paused`, `inmigrate`, `finish-migrate`, `postmigrate`, ..."""
        return run_state_of(await self.execute("query-status"))

    @property
    def guest_ran(self) -> bool:
        """Whether the guest ran until its migration paused it, as far as has been noted."""
        return self.guest_was in RUNNING

    async def note_guest(self) -> None:
        """Looks whether the guest has stopped, or gone on, by itself or by somebody else's hand."""
        state = await self.run_state()
        if state in RUNNING or state in STOPPED:
            self.guest_was = state

    async def check_source(self) -> None:
        """Raises `VmmNotReady` unless this guest runs and can be paused before the switchover."""
        state = await self.run_state()
        if state not in RUNNING:
            raise VmmNotReady(
                f"the source's guest is {in_words(state)} ({state!r}): it has to be running"
            )
        self.guest_was = state
        await self._check_pause_capability()
        migration = await self.execute("query-migrate")
        status = migration_status_of(migration)
        if status in UNDER_WAY:
            raise VmmNotReady(f"the source's VMM is migrating already (it is {status!r})")
        if reasons := blocked_reasons(migration):
            raise VmmNotReady(f"the source's VMM cannot be migrated: {'; '.join(reasons)}")

    async def check_target(self) -> None:
        """Raises `VmmNotReady` unless this VMM waits for `migrate-incoming`."""
        state = await self.run_state()
        if state != "inmigrate":
            raise VmmNotReady(
                f"the target's guest is {state!r}; start its VMM with -S -incoming defer"
            )
        await self._check_pause_capability()

    async def settings(self) -> MigrationSettings:
        """What of the VMM's settings this file changes, as they are now: for `put_back`."""
        return MigrationSettings.of(
            await self.execute("query-migrate-capabilities"),
            await self.execute("query-migrate-parameters"),
        )

    async def put_back(self, settings: MigrationSettings) -> None:
        """Sets everything as it was. Raises `VmmRefused` while a migration is under way."""
        for command, arguments in settings.commands():
            await self.execute(command, arguments)

    async def announce(self) -> None:
        """Has the VMM tell the network where its guest's emulated cards are from now on. QEMU does
        so by itself when it has loaded a guest, which is before that one is here for good."""
        with contextlib.suppress(VmmRefused):  # another VMM has no such command
            await self.execute("announce-self", ANNOUNCEMENT)

    async def why_closed(self) -> str:
        """Why this VMM's stream cannot be opened, as far as its settings tell; else empty."""
        return why_closed(
            await self.execute("query-migrate-capabilities"),
            await self.execute("query-migrate-parameters"),
        )

    async def start_incoming(self, uri: str) -> None:
        """Has the target's VMM listen at `uri` (`unix:PATH`), and wait when it has its guest: one
        that was started without -S would run it at once, whoever owns it. Changes none of its
        settings, so that nobody has to put them back."""
        await self.execute("stop")
        await self.execute("migrate-incoming", {"uri": uri})

    async def start_outgoing(self, uri: str, *, may_throttle: bool = False) -> None:
        """Starts the source's migration to `uri`; it does not switch over until it is allowed to,
        and slows no processor down before `throttle`.

        With a downtime limit of 0 a VMM goes on copying for as long as anything is dirty. QEMU
        may still reach pre-switchover early, when its guest writes nothing at all.
        """
        self._migration_mark = self.client.events_seen
        parameters = {"downtime-limit": 0}
        if may_throttle:
            parameters |= SLEEPING_THROTTLE
        throttle = [THROTTLE] if may_throttle else []
        await self._set_capabilities("events", PAUSE_CAPABILITY, *throttle)
        await self.execute("migrate-set-parameters", parameters)
        await self.execute("migrate", {"uri": uri})

    async def allow_switchover(self, downtime_ms: int) -> None:
        """Lets the VMM pause its guest once what is left takes less than `downtime_ms`."""
        limit = min(max(downtime_ms, 1), MAX_DOWNTIME_MS)
        await self.execute("migrate-set-parameters", {"downtime-limit": limit})

    async def limit_bandwidth(self, bytes_per_s: int) -> None:
        """Bounds how fast the VMM sends while its guest runs."""
        await self.execute("migrate-set-parameters", {"max-bandwidth": bytes_per_s})

    async def throttle(self, settings: MigrationSettings) -> None:
        """Has the VMM slow its processors down, as `settings` say, until the migration ends.

        `start_outgoing` has to have been told that this may come.
        """
        wanted = {name: settings.parameters[name] for name in THROTTLE_PARAMETERS}
        await self.execute("migrate-set-parameters", wanted)

    async def wait_pre_switchover(self) -> PreSwitchover:
        """Waits until the source's guest is paused. Raises `MigrationFailed`."""

        def judge(migration: Any) -> bool | None:
            status = self._status_unless_failed(migration)
            if status in ("device", "completed"):
                raise MigrationFailed(status, "it did not wait in pre-switchover")
            return True if status == "pre-switchover" else None

        await self._watch(judge, before=self.note_guest)
        waiting = self._event_of_pre_switchover()
        waiting_at = (waiting.timestamp if waiting else 0.0) or time.time()
        stop = self.client.last_event("STOP", since=self._migration_mark)
        return PreSwitchover((stop.timestamp if stop else 0.0) or waiting_at, waiting_at)

    async def paused_within(self, seconds: float) -> bool:
        """Waits so long, or until the VMM has paused its guest without being allowed to, as it may
        (see `start_outgoing`); whether it has."""
        with trio.move_on_after(seconds):
            while True:
                seen = self.client.events_seen
                if self._event_of_pre_switchover() is not None:
                    return True
                await self.client.wait_event(since=seen)
        return False

    async def settle(self) -> None:
        """Lets the VMM handle the interrupts that are pending in its event loop while its guest is
        paused. Raises `VmmNotReady` if the guest runs again: somebody else has a hand in it."""
        for _ in range(2):
            state = await self.run_state()
            if state in RUNNING:
                raise VmmNotReady(
                    "the guest was set going again during the switchover: its migration was "
                    "cancelled, or it was continued, from outside"
                )

    async def continue_switchover(self) -> None:
        """Lets the source's VMM send the rest. Raises `VmmRefused` outside pre-switchover."""
        await self.execute("migrate-continue", {"state": "pre-switchover"})

    async def wait_completed(self) -> None:
        """Waits until the source has sent everything. Raises `MigrationFailed`.

        It says nothing about the target, which may have failed to load it.
        """
        await self._watch(
            lambda migration: self._status_unless_failed(migration) == "completed" or None
        )

    async def wait_loaded(self) -> None:
        """Waits until the target has loaded everything and is paused. Raises `MigrationFailed`."""
        while True:
            if self._status_unless_failed(await self.execute("query-migrate")) == "completed":
                state = await self.run_state()
                if state != "inmigrate":
                    break
            await trio.sleep(LOADING_POLL_S)
        if state not in STOPPED:
            raise VmmNotReady(f"the target's guest is {state!r} after loading, it has to wait")

    async def resume(self) -> None:
        """Has a paused guest run, or sleep on if it slept. Raises `VmmRefused`, or `VmmNotReady` if
        it then does not."""
        await self.execute("cont")
        state = await self.run_state()
        if state not in RUNNING:
            raise VmmNotReady(f"the guest is {in_words(state)} ({state!r}) after 'cont'")

    async def cancel_and_resume(self, deadline_s: float) -> str:
        """Ends the source's migration in any of its states and has the guest run again, if it ran
        until the migration paused it (I12). Returns its run state then.

        Never call it once the target may own the guest. Raises `VmmNotReady` when the guest does
        not run at the deadline, or cannot.
        """
        state = status = "unknown"
        with trio.move_on_after(deadline_s):
            while True:
                seen = self.client.events_seen
                # In this order: a migration that ends between both answers is seen as under way.
                status = migration_status_of(await self.execute("query-migrate"))
                state = await self.run_state()
                step = resume_step(state, status, ran=self.guest_ran)
                if step is ResumeStep.NOTHING:
                    return state
                if step is not ResumeStep.WAIT:
                    try:
                        await self.execute(step.value)
                    except VmmRefused:
                        # The state has moved on meanwhile. If not, the deadline ends this.
                        pass
                    else:
                        if step is ResumeStep.CONTINUE:
                            continue
                await self._wait_event_or_poll(seen)
        raise VmmNotReady(
            f"the source's guest is {state!r} (migration {status!r}) after {deadline_s:g} s; "
            "continue it by hand ('migrate_cancel', 'cont')"
        )

    async def wait_gone(self) -> None:
        """Never returns: raises `VmmGone` as soon as the connection ends."""
        while True:
            await self.client.wait_event(since=self.client.events_seen)

    async def quit(self) -> None:
        """Ends the VMM. That it is gone already is no error."""
        try:
            await self.execute("quit")
        except VmmGone:
            return

    async def progress(self) -> VmmProgress:
        """How far the VMM's migration has come."""
        return parse_progress(await self.execute("query-migrate"))

    async def check_migration(self) -> VmmProgress:
        """`progress`, unless the migration has come to grief. Raises `MigrationFailed`."""
        await self.note_guest()
        progress = await self.progress()
        if progress.error or progress.status in FAILED:
            raise MigrationFailed(progress.status, progress.error)
        return progress

    async def _check_pause_capability(self) -> None:
        capabilities = await self.execute("query-migrate-capabilities")
        if not isinstance(capabilities, list):
            raise QmpProtocolError("query-migrate-capabilities returned no list")
        names = [entry.get("capability") for entry in capabilities if isinstance(entry, dict)]
        if PAUSE_CAPABILITY not in names:
            raise VmmNotReady(f"the VMM cannot {PAUSE_CAPABILITY}; QEMU can since 2.11")

    async def _set_capabilities(self, *names: str) -> None:
        wanted = [{"capability": name, "state": True} for name in names]
        await self.execute("migrate-set-capabilities", {"capabilities": wanted})

    def _status_unless_failed(self, migration: Any) -> str:
        status = migration_status_of(migration)
        if status in FAILED:
            raise MigrationFailed(status, str(migration.get("error-desc", "")))
        return status

    def _event_of_pre_switchover(self) -> QmpEvent | None:
        """The event that says that it waits there, unless another status followed."""
        event = self.client.last_event("MIGRATION", since=self._migration_mark)
        there = event is not None and event.data.get("status") == "pre-switchover"
        return event if there else None

    async def _watch(
        self,
        judge: Callable[[Any], T | None],
        before: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    ) -> T:
        """Asks `query-migrate` at once and after each event until `judge` returns something; does
        `before` before each time."""
        while True:
            seen = self.client.events_seen
            await before()
            verdict = judge(await self.execute("query-migrate"))
            if verdict is not None:
                return verdict
            await self._wait_event_or_poll(seen)

    async def _wait_event_or_poll(self, seen: int) -> None:
        with trio.move_on_after(POLL_S):
            await self.client.wait_event(since=seen)


def blocked_reasons(migration: Any) -> list[str]:
    """Why the VMM would refuse to migrate, out of what `query-migrate` returned."""
    reasons = migration.get("blocked-reasons", []) if isinstance(migration, dict) else []
    if not isinstance(reasons, list):
        raise QmpProtocolError("query-migrate returned malformed blocked-reasons")
    return [str(reason) for reason in reasons]


async def resume_source(vmm: Vmm, path: str, deadline_s: float) -> str:
    """`Vmm.cancel_and_resume`; over a new connection to `path` if the one of `vmm` has ended."""
    try:
        return await vmm.cancel_and_resume(deadline_s)
    except VmmGone:
        async with await Vmm.connect(path, deadline_s=RECONNECT_S) as again:
            again.guest_was = vmm.guest_was
            return await again.cancel_and_resume(deadline_s)


async def put_back_source(vmm: Vmm, path: str, settings: MigrationSettings) -> None:
    """`Vmm.put_back`; over a new connection to `path` if the one of `vmm` has ended."""
    try:
        await vmm.put_back(settings)
    except VmmGone:
        async with await Vmm.connect(path, deadline_s=RECONNECT_S) as again:
            await again.put_back(settings)


def parse_progress(migration: Any) -> VmmProgress:
    """What `query-migrate` returned, checked. Raises `QmpProtocolError`."""
    status = migration_status_of(migration)
    ram = migration.get("ram", {})
    if not isinstance(ram, dict):
        raise QmpProtocolError("query-migrate returned a malformed 'ram'")

    def number(source: dict[str, Any], key: str) -> int:
        value = source.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise QmpProtocolError(f"query-migrate returned a malformed {key!r}")
        if math.isinf(value):
            raise QmpProtocolError(f"query-migrate returned a malformed {key!r}")
        return int(value)

    return VmmProgress(
        status=status,
        transferred_bytes=number(ram, "transferred"),
        remaining_bytes=number(ram, "remaining"),
        total_bytes=number(ram, "total"),
        dirty_pages_per_s=number(ram, "dirty-pages-rate"),
        rounds=number(ram, "dirty-sync-count"),
        page_bytes=number(ram, "page-size"),
        downtime_ms=number(migration, "downtime"),
        error=str(migration.get("error-desc", "")),
    )
