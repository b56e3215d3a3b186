"""The rounds in which dirty pages move, and how far they and the VMM's stream have come.

What devices wrote and what an opened stream announces is one dirty set.

Owns what has been collected and is not sent yet, the events `round` and `progress`, and the rows
of the report. When to switch over is decided by `sync.convergence`; the phases are
`ferry.migration.source`'s.
"""

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import trio

from ferry.errors import NotConverged
from ferry.migration.pacing import Pace
from ferry.migration.report import Report, finite, merged_rounds, round_values
from ferry.migration.send_options import Options
from ferry.migration.source_link import SourceLink
from ferry.migration.verification import RollingProof
from ferry.migration.vmm_stream import VmmStream
from ferry.nurseries import alongside
from ferry.progress import Reporter
from sync.convergence import FIXED_COST_MS, Convergence, Limits, Round, Verdict
from sync.dirty.merge import MergedTrackers
from sync.dirty.tracker import Bitmap, n_words
from sync.memory import PAGE_BYTES
from sync.registers.interface import StateLeft
from sync.vmm.driver import Vmm, VmmProgress
from transport.kernels.bitmap import bitmap_to_indices
from transport.sender import RoundStatistics

ROUND_INTERVAL_S = 0.1
"""A round is no shorter: below this the fixed cost of a round is most of it."""
PROGRESS_INTERVAL_S = 1.0
LOOK_INTERVAL_S = 0.1
"""How often devices and VMM are looked at beside the rounds of an open stream."""
ROW_INTERVAL_S = 5.0
"""Rounds that are not judged are told together, at the latest after this time."""
RATE_ROUNDS = 32
"""Rates are measured over so many rounds of an open stream."""
ROLL_PAGES = 1 << 14
"""So many pages are compared at once while the guest runs."""


def limits_of(options: Options, showing_ms: float = 0.0) -> Limits:
    """What the user allows the rounds. `showing_ms`: how long the target's devices take to be shown
    guest memory, for which the guest stands still."""
    return Limits(
        fixed_cost_ms=FIXED_COST_MS + showing_ms,
        downtime_ms=options.downtime_limit,
        threshold_pages=options.threshold,
        max_rounds=options.max_rounds,
        timeout_s=options.timeout,
        on_stall=options.on_stall,
    )


class Precopy:
    """The rounds of one migration, from the first one to the one when the guest stands still."""

    def __init__(
        self,
        options: Options,
        link: SourceLink,
        vmm: Vmm,
        dirty: MergedTrackers,
        stream: VmmStream,
        pace: Pace,
        proof: RollingProof,
        proof_ns: Callable[[], Awaitable[int]],
        state_left: Callable[[], Awaitable[StateLeft]],
        throttle: Callable[[], Awaitable[None]],
        report: Report,
        reporter: Reporter,
        showing_ms: float = 0.0,
    ) -> None:
        """`proof_ns` predicts how long it would take to prove equal what `proof` leaves;
        `state_left` tells what the devices hold themselves; `throttle` has the VMM slow the guest
        down; `showing_ms` is that of `limits_of`."""
        self._options = options
        self._showing_ms = showing_ms
        self._link = link
        self._vmm = vmm
        self._dirty = dirty
        self._stream = stream
        self._pace = pace
        self._proof = proof
        self._throttle = throttle
        self._proof_ns = proof_ns
        self._state_left = state_left
        self._report = report
        self._reporter = reporter
        self._owed: Bitmap = np.zeros(n_words(dirty.n_pages), np.uint64)
        self._owed_cost = 0.0
        self._round_ended = trio.current_time()
        self._untold: list[RoundStatistics] = []
        self._unjudged = deque[RoundStatistics](maxlen=RATE_ROUNDS)
        self._judged_at = trio.current_time()
        self._pass = self._judged_pass = 1
        """The VMM's pass over its memory, and the one in which rounds were judged last."""
        self._vmm_rounds, self._vmm_left = 1, math.inf
        """What it said last: how many passes it has begun, and how many bytes are left."""
        self._asking, self._collecting = trio.Lock(), trio.Lock()
        self._device_pages = 0
        """Found since progress was told last."""
        self._device_pages_per_s = 0.0
        self._predicted_ms: float | None = None
        self._state_ms = 0.0
        self._guest_waits_until = math.inf
        """When a guest that its VMM has paused by itself has waited for rounds long enough."""

    def change(self, options: Options) -> None:
        """Goes on with other limits."""
        self._options = options
        self._pace.allow(options.downtime_limit, options.bandwidth)

    @property
    def decided_downtime_ms(self) -> float:
        """What the downtime was predicted to be when it was decided to switch over; 0 where nothing
        was predicted."""
        predicted = self._predicted_ms
        return predicted if predicted is not None and math.isfinite(predicted) else 0.0

    @property
    def decided_for_vmm_ms(self) -> float:
        """As much of it as is not for the devices' own state."""
        return max(0.0, self.decided_downtime_ms - self._state_ms)

    async def converge(self) -> None:
        """Sends rounds until what is left fits into the downtime. Raises `NotConverged`,
        `MigrationFailed`."""
        async with alongside(self._tell_progress), alongside(self._look_beside):
            await self._rounds_until_small()

    async def _look_beside(self) -> None:
        """Looks at devices and VMM while the rounds of an open stream go on, for whose answers no
        lane has to wait then."""
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            if self._stream.is_open:
                await self._ask()
                await self.collect_devices()

    async def _rounds_until_small(self) -> None:
        options = self._options
        convergence = Convergence(limits_of(options, self._showing_ms))
        await self._collect()
        await self._ask()
        while True:
            began, links = trio.current_time(), self._links
            round_ = await self._send_in_time()
            if not self._stream.is_open:
                self._unjudged.clear()
            self._unjudged.append(round_)
            rest_s = max(0.0, ROUND_INTERVAL_S - (trio.current_time() - began))
            if await self._paused_within(rest_s):
                # Its guest stands still: what is left is for the last round. That has no bound, so
                # what was written during a long round is sent before.
                self._note_round(round_)
                if not rest_s or self._stream.is_open:
                    await self._collect()
                    self._note_round(await self._send_in_time())
                return
            if links != self._links:
                # A round in which there was no link does not tell how fast it is.
                self._unjudged.clear()
                self._judged_at = trio.current_time()
                self._note_round(round_)
                await self._collect()
                continue
            # The VMM is in its first pass over all of memory: nothing converges before that is
            # over, so these rounds are not judged. When all pages take the lanes, neither are those
            # in the middle of a pass.
            if self._stream.is_open:
                if self._proof.n_rolling >= ROLL_PAGES and self._vmm_rounds <= 1:
                    await self._roll()
                if self._pass == self._judged_pass:
                    self._note_round(round_)
                    self._owe(*self._stream.collect())
                    continue
            progress = await self._ask()
            collect_s = await self._collect()
            collected = trio.current_time()
            left = self._owed_pages() + self._vmm_pages(progress)
            vmm_bytes = 0 if self._stream.is_open else progress.remaining_bytes
            if not self._stream.is_open and progress.rounds <= 1:
                self._note_round(round_, left, None, progress.remaining_bytes)
                continue
            convergence.heed(self._options.downtime_limit, self._options.on_stall)
            recent = merged_rounds(self._unjudged)
            state = await self._state_left()
            decision = convergence.observe(
                Round(
                    sent_pages=self._sent_pages(recent),
                    wire_bytes=recent.wire_bytes,
                    duration_ns=recent.duration_ns,
                    interval_ns=int((collected - self._judged_at) * 1e9),
                    dirty_pages=left,
                    vmm_remaining_bytes=vmm_bytes,
                    collect_ns=int(collect_s * 1e9),
                    proof_ns=await self._proof_ns(),
                    state_bytes=state.bytes,
                    state_ns=int(state.bytes * state.ns_per_byte),
                )
            )
            self._unjudged.clear()
            self._judged_at, self._judged_pass = collected, self._pass
            self._predicted_ms = decision.predicted_downtime_ms
            self._state_ms = convergence.state_ms
            self._note_round(round_, left, self._predicted_ms, progress.remaining_bytes)
            if decision.verdict is Verdict.GIVE_UP:
                raise NotConverged(decision.message)
            if decision.verdict is Verdict.THROTTLE:
                self._reporter.event("message", text=decision.message)
                await self._throttle()
            if decision.verdict is Verdict.SWITCH:
                self._reporter.event("message", text=decision.message)
                self._note_round(await self._send())
                return
            if self._stream.is_open:
                await self._roll()

    @property
    def _links(self) -> int:
        """How often the link was made anew."""
        return self._link.sender.link.resumed

    async def _ask(self) -> VmmProgress:
        async with self._asking:
            announced = self._stream.pages
            progress = await self._vmm.check_migration()
        # In a pass that takes long a VMM that may throttle looks again and again at what is dirty,
        # and does not count that: only then is more left than before.
        if progress.rounds > self._vmm_rounds or progress.remaining_bytes > self._vmm_left:
            self._pass += 1
        self._vmm_rounds, self._vmm_left = progress.rounds, progress.remaining_bytes
        self._pace.remain(progress.remaining_bytes // PAGE_BYTES)
        self._pace.announced(self._stream.pages - announced)
        return progress

    def _sent_pages(self, rounds: RoundStatistics) -> int:
        """Pages that went as fast as those that are left will. In its first pass the VMM brings all
        the memory that its guest has never used, and that says nothing of what is written now."""
        if self._stream.is_open and self._judged_pass == 1:
            return math.ceil(self._pace.cost_of(rounds.sent_pages, rounds.zero))
        return rounds.sent_pages

    def _vmm_pages(self, progress: VmmProgress) -> int:
        """What the VMM has still to announce, if that takes our lanes."""
        if not self._stream.is_open:
            return 0
        unknown_s = min(LOOK_INTERVAL_S, trio.current_time() - self._judged_at)
        return progress.remaining_bytes // PAGE_BYTES + int(progress.dirty_pages_per_s * unknown_s)

    async def _paused_within(self, seconds: float) -> bool:
        """`Vmm.paused_within`, which ends as soon as enough is announced for another round."""
        with trio.CancelScope() as scope:

            async def end_early() -> None:
                await self._stream.wait_worth_a_round()
                scope.cancel()

            async with alongside(end_early):
                return await self._vmm.paused_within(seconds)
        return False

    async def keep_small(self) -> None:
        """Sends rounds until it is cancelled, which takes effect at once."""
        async with alongside(self._tell_progress):
            while True:
                await self._collect()
                self._note_round(await self._send())
                with trio.move_on_after(ROUND_INTERVAL_S):
                    await self._stream.wait_worth_a_round()

    async def collect_devices(self) -> float:
        """Finds what the devices have written; how long that took, in seconds."""
        async with self._collecting:
            began = trio.current_time()
            found = await self._dirty.collect()
            took_s = trio.current_time() - began
        pages = bitmap_to_indices(found)
        self._stream.wrote(pages)
        self._device_pages += pages.size
        self._owe(found, float(pages.size))
        return took_s

    async def finish(self) -> None:
        """Sends the last round: nothing writes to the guest's memory any more."""
        await self._collect()
        round_ = await self._send()
        self._tell_rounds()
        self._note_round(round_)
        self._tell_rounds()

    async def _collect(self) -> float:
        """All of it before any page is read (I1). Returns what `collect_devices` does."""
        took_s = await self.collect_devices()
        self._owe(*self._stream.collect())
        return took_s

    def _owe(self, bits: Bitmap, cost: float) -> None:
        self._owed |= bits
        self._owed_cost += cost
        self._proof.collected(bits)

    async def _roll(self) -> None:
        """Compares what was sent while the guest runs, where nobody else writes to the target."""
        if self._stream.is_exclusive:
            await self._proof.roll(self._link)

    async def _send(self) -> RoundStatistics:
        """Sends what is owed; it stays owed if this is cancelled. What is found meanwhile is owed
        after this."""
        links = self._links
        pages, cost = self._owed, self._owed_cost
        self._owed, self._owed_cost = np.zeros_like(pages), 0.0
        try:
            round_ = await self._link.send_pages(bitmap_to_indices(pages))
        except BaseException:
            self._owed |= pages
            self._owed_cost += cost
            raise
        round_trip_s = self._link.sender.statistics().round_trip_ns / 1e9
        if links == self._links:
            seconds = round_.duration_ns / 1e9
            self._pace.sent(cost, round_.wire_bytes, seconds, round_trip_s)
        self._stream.acknowledged()
        self._proof.sent(pages & ~self._owed)
        return round_

    async def _send_in_time(self) -> RoundStatistics:
        """Sends what is owed. Raises `NotConverged` if the VMM has paused its guest by itself, and
        that would have to stand still for longer than it may."""
        limit_ms = self._options.downtime_limit
        with trio.CancelScope() as scope:

            async def bound() -> None:
                await self._vmm.paused_within(math.inf)
                self._guest_waits_until = min(
                    self._guest_waits_until, trio.current_time() + limit_ms / 1e3
                )
                scope.deadline = self._guest_waits_until

            async with alongside(bound):
                return await self._send()
        raise NotConverged(
            "the VMM found nothing more to send and paused its guest by itself, while the devices' "
            f"pages were still under way and took longer than {limit_ms} ms: the guest goes on "
            "here; try again, or allow a longer --downtime-limit"
        )

    def _owed_pages(self) -> int:
        return int(np.bitwise_count(self._owed).sum())

    def _note_round(
        self,
        round_: RoundStatistics,
        left: int | None = None,
        predicted_ms: float | None = None,
        vmm_remaining_bytes: int | None = None,
    ) -> None:
        """Reports a round, with what was known behind it: pages left, and what follows from it.
        Of the many short rounds of an open stream those that were not judged are told together."""
        self._untold.append(round_)
        waited_s = trio.current_time() - self._round_ended
        if left is not None or not self._stream.is_open or waited_s >= ROW_INTERVAL_S:
            self._tell_rounds(left, predicted_ms, vmm_remaining_bytes)

    def _tell_rounds(
        self,
        left: int | None = None,
        predicted_ms: float | None = None,
        vmm_remaining_bytes: int | None = None,
    ) -> None:
        if not self._untold:
            return
        now = trio.current_time()
        interval_s, self._round_ended = now - self._round_ended, now
        values = round_values(
            merged_rounds(self._untold), left, interval_s, predicted_ms, vmm_remaining_bytes
        )
        self._untold.clear()
        self._report.rounds.append(values)
        self._reporter.event("round", **values)

    async def _tell_progress(self) -> None:
        """Reports how far both streams, ours and the VMM's, have come, about once a second."""
        moved, asked_at = self._moved_bytes(), time.monotonic()
        while True:
            await trio.sleep(PROGRESS_INTERVAL_S)
            vmm = await self._vmm.progress()
            before, since = moved, asked_at
            moved, asked_at = self._moved_bytes(), time.monotonic()
            passed_s = asked_at - since
            self._device_pages_per_s, self._device_pages = self._device_pages / passed_s, 0
            self._reporter.event("progress", **self._values(vmm, (moved - before) / passed_s))

    def _values(self, vmm: VmmProgress, bytes_per_s: float) -> dict[str, Any]:
        round_, link = self._link.sender.round_progress(), self._link.sender.link
        under_way = max(0, round_.pages - round_.done_pages) if round_ else 0
        own = PAGE_BYTES * (under_way + self._stream.announced_pages)
        own_dirty = PAGE_BYTES * self._device_pages_per_s
        vmm_dirty = vmm.page_bytes * vmm.dirty_pages_per_s
        left, dirty = own + vmm.remaining_bytes, own_dirty + vmm_dirty
        return {
            "round": round_.round_no if round_ else 0,
            "vmm_round": vmm.rounds,
            "total_bytes": PAGE_BYTES * self._dirty.n_pages,
            "downtime_limit_ms": self._options.downtime_limit,
            "remaining_bytes": left,
            "own_remaining_bytes": own,
            "vmm_remaining_bytes": vmm.remaining_bytes,
            "dirty_bytes_per_s": dirty,
            "own_dirty_bytes_per_s": own_dirty,
            "vmm_dirty_bytes_per_s": vmm_dirty,
            "throughput_bytes_per_s": bytes_per_s,
            "predicted_downtime_ms": finite(self._predicted_ms),
            "link_lost_s": time.monotonic() - link.lost_at if link.lost else 0.0,
        }

    def _moved_bytes(self) -> int:
        return sum(self._link.wire_bytes().values())
