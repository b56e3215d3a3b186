"""The source's side of one migration: what is done in which phase, in the order of the phases.

Owns the order of things on the source. When which phase begins is decided by `sync.handover`, the
rounds are `ferry.migration.precopy`'s; the command around it is `ferry.commands.send`.

Each phase hands what it has made to the next one, as a value, by saying how that one's action is
performed (`HandoverRunner.offer`): so no action can be performed before what it needs is there.
What has to be undone is noted in an `Undo` before it is begun, and is undone from any phase.
"""

import contextlib
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import trio

from ferry.errors import Mismatch
from ferry.findings import methods_text, ok
from ferry.migration.belonging import prove_one_vm
from ferry.migration.check import findings_of, measure, stream_finding
from ferry.migration.device_watch import Verdict
from ferry.migration.devices import offer_of
from ferry.migration.downtime import Downtime, standstill_budget_s
from ferry.migration.forecast import DeviceShare, forecast, look_at
from ferry.migration.handover_runner import HandoverRunner
from ferry.migration.link_news import tell_link
from ferry.migration.messages import MessageKind, MigrationHello, Notice
from ferry.migration.pacing import MAX_BYTES_PER_S, Pace, keep_pace
from ferry.migration.phases import Phases
from ferry.migration.precopy import Precopy
from ferry.migration.register_pump import RegisterPump
from ferry.migration.report import Report
from ferry.migration.send_options import Options
from ferry.migration.source_devices import (
    SourceDevice,
    attach_devices,
    keep_alive,
    map_memory,
    showing_ms,
    state_left,
)
from ferry.migration.source_link import SourceLink
from ferry.migration.undo import Undo, UndoStage
from ferry.migration.verification import ProofTime, RollingProof, prove_equal
from ferry.migration.vmm_stream import VmmStream
from ferry.nurseries import alongside, ungrouped
from ferry.progress import Reporter
from sync.dirty.merge import MergedTrackers
from sync.gateway.engine.records import Terms
from sync.gateway.errors import GatewayError
from sync.handover.machine import Action, Event, Handover
from sync.handover.states import STANDSTILL, Deadlines, HandoverState, Role
from sync.memory import GuestMemory
from sync.registers.interface import StateLeft
from sync.vmm.driver import Vmm, put_back_source, resume_source
from sync.vmm.errors import VmmError, VmmGone
from sync.vmm.identity import VmmIdentity, identify
from sync.vmm.pci import PciPlatform
from sync.vmm.settings import MigrationSettings
from sync.vmm.states import RUNNING, in_words
from sync.vmm.stream.mapping import FileRange
from sync.vmm.uncarried import check_carried
from transport.kernels.bitmap import bitmap_to_indices

PAUSING_S = 30.0
"""How long a VMM may take to pause its guest, beside the downtime that it is allowed."""
SILENCE_S = 10.0
"""A process that says nothing for so long to a gateway whose device it has mediated has failed."""
RECOVERY_DEADLINE_S = 10.0
"""How long a VMM may take to let its guest run again."""


@dataclass(frozen=True)
class Prepared:
    """The guest and the link: all that takes part, found to fit and not touched yet."""

    devices: tuple[SourceDevice, ...]
    memory: GuestMemory
    vmm: Vmm
    platform: PciPlatform | None
    """What the VMM keeps of the devices; QEMU only."""
    link: SourceLink
    files: tuple[FileRange, ...]
    """What the guest's memory is, for the proof that the VMM's RAM is the same."""
    settings: MigrationSettings
    """The VMM's own, as they were."""
    why_closed: str
    """Why the VMM's stream is not to be opened, if so."""


@dataclass(frozen=True)
class Mediated:
    """The work that goes on beside a guest whose devices are mediated."""

    pump: RegisterPump
    dirty: MergedTrackers
    stream: VmmStream
    proof: RollingProof
    precopy: Precopy


class Source:
    """The source of one migration: performs the actions that the handover asks for."""

    def __init__(
        self,
        options: Options,
        reporter: Reporter,
        nursery: trio.Nursery,
        held: contextlib.AsyncExitStack,
        *,
        own_process: bool = False,
    ) -> None:
        """What is opened is put into `held`, which has to be closed when `nursery` has ended.

        `own_process`: nothing else is done by this process, so it may be ended where it hangs.
        """
        self._own_process = own_process
        self._options = options
        self._reporter = reporter
        self._nursery = nursery
        self._held = held
        self._session = secrets.token_bytes(16)
        self._changes: list[Callable[[Options], None]] = []
        self._tokens = (secrets.token_hex(8), secrets.token_hex(8))
        self._undo = Undo()
        self._pacing = trio.CancelScope()
        self.touched = False
        """Something has been done to a device; before, nothing here is other than it was."""
        self.vmm_ended = False
        """The guest has moved, and its VMM here was ended, as asked for."""
        self._is_put_back = False
        self._is_told = False
        """That a device does not tell how much state it has."""
        self.report = Report(self._session.hex(), downtime_limit_ms=options.downtime_limit)
        self.watched = Verdict()
        """Whether the devices work at the target."""
        self._began = trio.current_time()
        # A scan reads all of the guest's memory before the rounds. How long the VMM may take to
        # pause follows from what has been decided by then.
        limits = Deadlines(
            mediating_s=options.timeout + 10.0, precopy_s=options.timeout + 60.0, pausing_s=None
        )
        self.runner = HandoverRunner(
            Handover(Role.SOURCE, limits),
            {
                Action.PREPARE: self._prepare,
                Action.TELL_ABORT: trio.lowlevel.checkpoint,  # there is nobody to tell yet
                Action.RESTORE: self._restore,
            },
            failure_events={Action.RESTORE: Event.RESTORE_FAILED},
            on_state=Phases(reporter, options.break_at).enter,
        )

    @property
    def options(self) -> Options:
        """What the user wants now."""
        return self._options

    def change(self, options: Options) -> None:
        """Goes on with other limits: bandwidth, downtime, and what to do on a stall."""
        self._options = options
        self.report.downtime_limit_ms = options.downtime_limit
        for heed in self._changes:
            heed(options)

    # --- prepare: nothing is touched ---

    @property
    def session(self) -> str:
        """The session's name, as the gateways' records have it."""
        return self._session.hex()

    async def _prepare(self) -> Event:
        options = self._options
        devices = await attach_devices(options, self._session.hex(), self._held, self._undo)
        self.report.methods = [
            {"registers": device.registers.method, "dirty": device.tracking} for device in devices
        ]
        memory, layout = await map_memory(devices, self._held)
        vmm = await self._held.enter_async_context(await Vmm.connect(options.qmp))
        await vmm.check_source()
        places = await prove_one_vm(
            [device.path for device in devices],
            [device.gateway for device in devices],
            vmm,
            vouched=options.vouch_one_vm,
        )
        identity = await identify(vmm)
        await check_carried(vmm)
        settings, why_closed = await self._look_at_settings(vmm, identity)
        platform = await self._attach_platform(vmm, devices)
        files, rows = layout.rows()
        hello = MigrationHello(
            session=self._session.hex(),
            devices=[
                offer_of(each.info, await each.registers.offer(), place)
                for each, place in zip(devices, places, strict=True)
            ],
            layout=rows,
            files=files,
            platform=(await platform.peek()).hex() if platform else "",
            vmm=asdict(identity),
            check=options.check,
            tokens=self._tokens,
        )
        link = await SourceLink.open(options, self._session, hello, self.runner, self._held)
        self.runner.offer({Action.TELL_ABORT: link.tell_abort})
        self._changes.append(lambda changed: link.sender.limit_bandwidth(changed.bandwidth))
        self._nursery.start_soon(link.listen)
        if not options.check:
            link.sender.hold()
            self._nursery.start_soon(tell_link, link.sender, self.runner, self._reporter)
        if options.check:
            for device, methods in zip(devices, self.report.methods, strict=True):
                self._reporter.finding(ok(f"device at {device.path}", methods_text(**methods)))
            self._reporter.finding(stream_finding(why_closed))
            look = await look_at(memory)
            sample = await measure(link.sender)
            for finding in findings_of(link.sender, identity, memory.n_pages, sample):
                self._reporter.finding(finding)
            scans = any(device.tracking == "scan" for device in devices)
            shares = [
                DeviceShare(await each.registers.state_left(), showing_ms([each], memory.n_pages))
                for each in devices
            ]
            expected = forecast(look, sample.bytes_per_s, options, scans=scans, devices=shares)
            self._reporter.finding(expected.finding())
            told = [
                {**methods, **expected.device_values(number)}
                for number, methods in enumerate(self.report.methods)
            ]
            self._reporter.event("forecast", **expected.values(), devices=told)
            return Event.CHECKED
        ranges = tuple(layout.file_ranges())
        prepared = Prepared(devices, memory, vmm, platform, link, ranges, settings, why_closed)
        self.runner.offer({Action.MEDIATE: partial(self._mediate, prepared)})
        return Event.PREPARED

    async def _look_at_settings(
        self, vmm: Vmm, identity: VmmIdentity
    ) -> tuple[MigrationSettings, str]:
        """The VMM's settings, and why its stream is not to be opened. Raises `Mismatch`."""
        wish = self._options.vmm_stream
        settings = await vmm.settings()
        if self._options.on_stall == "throttle":
            settings.check_throttle()
        if wish == "closed":
            return settings, "as asked for"
        why_closed = await vmm.why_closed()
        if not identity.is_qemu:
            why_closed = f"{identity.name} has one of its own form"
        if why_closed and wish == "open":
            raise Mismatch(
                f"--vmm-stream open: the stream cannot be opened: {why_closed}; change that, or "
                "use --vmm-stream auto"
            )
        return settings, why_closed

    async def _attach_platform(
        self, vmm: Vmm, devices: Sequence[SourceDevice]
    ) -> PciPlatform | None:
        platform = await PciPlatform.attach(vmm, self._options.qmp)
        if platform is None:
            return None
        self._held.push_async_callback(platform.aclose)
        n_gateways = len(self._options.gateway)
        if platform.n_devices != n_gateways:
            raise Mismatch(
                f"the VMM has {platform.n_devices} vfio-user-pci devices, --gateway was given "
                f"{n_gateways} times: give it once for each of them"
            )
        await platform.locate([device.info.identity for device in devices])
        return platform

    # --- pre-copy ---

    async def _mediate(self, prepared: Prepared) -> Event:
        self.touched = True
        options, vmm, link = self._options, prepared.vmm, prepared.link
        memory = prepared.memory
        link.sender.attach_memory(memory.array, cache_bytes=options.cache, files=memory.files)
        pump = RegisterPump(link, self.runner)
        self._undo.add(UndoStage.TASKS, pump.give_up)
        self._nursery.start_soon(pump.run)
        self._nursery.start_soon(keep_alive, prepared.devices)
        trackers = [device.tracker(memory, link.sender.seed) for device in prepared.devices]
        for device, tracker in zip(prepared.devices, trackers, strict=True):
            self._held.push_async_callback(tracker.stop)
            decides = device is prepared.devices[0]
            await self._arm_recovery(prepared, device)
            mediation = await device.gateway.mediate(
                tracker=tracker.asks_gateway_for,
                page_size=options.log_page_size,
                capture=device.registers.capture,
                snapshot=await device.registers.snapshot(),
                terms=Terms(decides, *self._tokens),
            )
            async for payload in device.registers.begin(mediation.values, mediation.journal_seq):
                await link.send_state(device.number, payload)
            # Before the tracker starts, which may take long: the journal is of limited size.
            pump.add(device)
            await tracker.start(mediation)
        dirty = MergedTrackers(trackers)
        proof_time, proof = ProofTime(memory, options.lanes), RollingProof(memory.n_pages)

        async def proof_ns() -> int:
            everything = self._proves_everything(dirty)
            return await proof_time.predict_ns(proof.left(dirty.touched), everything=everything)

        most = prepared.settings.most_bytes_per_s or MAX_BYTES_PER_S
        pace = Pace(options.downtime_limit, most, options.bandwidth)
        stream = VmmStream(
            memory.array,
            prepared.files,
            pace,
            lambda text: self._reporter.event("message", text=text),
            must_open=options.vmm_stream == "open",
            why_closed=prepared.why_closed,
        )
        precopy = Precopy(
            options,
            link,
            vmm,
            dirty,
            stream,
            pace,
            proof,
            proof_ns,
            partial(self._state_left, prepared.devices),
            partial(vmm.throttle, prepared.settings),
            self.report,
            self._reporter,
            showing_ms(prepared.devices, prepared.memory.n_pages),
        )
        self._changes.append(precopy.change)
        self._undo.add(UndoStage.TASKS, link.cut_vmm_stream)
        path: str = await self._nursery.start(
            link.carry_vmm_stream, stream, partial(self._vmm_stream_is_complete, vmm)
        )
        # Only now: what a device writes is tracked before the VMM reads the first page. And before
        # this, the VMM may be paused or migrating for somebody else's reasons.
        self._held.push_async_callback(self._put_back, prepared)
        self._undo.add(UndoStage.GUEST, partial(self._resume_guest, vmm))
        self._undo.add(UndoStage.GUEST, partial(self._put_back, prepared))
        await vmm.start_outgoing(f"unix:{path}", may_throttle=options.on_stall == "throttle")
        if not prepared.why_closed:
            self._undo.add(UndoStage.TASKS, self._stop_pacing)
            self._nursery.start_soon(self._keep_pace, pace, stream, vmm)
        mediated = Mediated(pump, dirty, stream, proof, precopy)
        self.runner.offer(
            {
                Action.RUN_ROUNDS: partial(self._run_rounds, precopy),
                Action.PAUSE_VMM: partial(self._pause_vmm, prepared, mediated),
            }
        )
        return Event.MEDIATED

    async def _state_left(self, devices: Sequence[SourceDevice]) -> StateLeft:
        left, silent = await state_left(devices)
        if silent and not self._is_told:
            self._is_told = True
            numbers = ", ".join(map(str, silent))
            text = f"device {numbers}: how long its state is it does not tell, so the downtime is "
            self._reporter.event("message", text=f"{text}predicted without it")
        return left

    async def _keep_pace(self, pace: Pace, stream: VmmStream, vmm: Vmm) -> None:
        with self._pacing, contextlib.suppress(VmmError):
            await keep_pace(pace, stream, vmm.limit_bandwidth)

    async def _stop_pacing(self) -> None:
        self._pacing.cancel()

    async def _put_back(self, prepared: Prepared) -> None:
        """Gives the VMM its settings back, once. That it refuses is told, and keeps nobody
        waiting."""
        if self._is_put_back:
            return
        try:
            await put_back_source(prepared.vmm, self._options.qmp, prepared.settings)
            self._is_put_back = True
        except VmmGone:
            return
        except VmmError as error:
            text = f"the VMM's settings of the migration are not as they were: {error}"
            self._reporter.event("message", text=text)

    async def _arm_recovery(self, prepared: Prepared, device: SourceDevice) -> None:
        """Each gateway watches this process; only the one that decides resumes the VMM, after the
        others' devices are back."""
        decides = device is prepared.devices[0]
        await device.gateway.arm_recovery(
            self._options.qmp if decides else "",
            RECOVERY_DEADLINE_S,
            prepared.settings.pack(),
            self._options.gateway[1:] if decides else (),
            ran=prepared.vmm.guest_ran,
            silence_s=SILENCE_S,
            may_end_holder=self._own_process,
        )

    def _proves_everything(self, dirty: MergedTrackers) -> bool:
        return self._options.verify == "all" or not dirty.complete

    async def _vmm_stream_is_complete(self, vmm: Vmm) -> bool:
        """Whether the VMM's stream has ended as it should. If not, the target's VMM will fail of
        it, and the handover hears the reason from here."""
        try:
            await vmm.check_migration()
        except VmmError as error:
            self.runner.post(Event.FAILED, error)
            return False
        return True

    async def _run_rounds(self, precopy: Precopy) -> Event:
        await precopy.converge()
        allowed_ms = max(self._options.downtime_limit, precopy.decided_downtime_ms)
        self.runner.allow(
            frozenset({HandoverState.PAUSING}),
            PAUSING_S + allowed_ms / 1e3,
            "the VMM does not pause its guest: allow a longer --downtime-limit; it was given",
        )
        return Event.CONVERGED

    async def _pause_vmm(self, prepared: Prepared, mediated: Mediated) -> Event:
        """Lets the VMM switch over, and keeps the dirty set small until it does."""
        # The VMM may leave so much of its own for the time when the guest stands still; the rest
        # of the limit is for what follows from it.
        limit_ms = self._options.downtime_limit
        decided_ms = mediated.precopy.decided_downtime_ms
        for_vmm_ms = mediated.precopy.decided_for_vmm_ms
        await prepared.vmm.allow_switchover(max(1, limit_ms // 3, math.ceil(for_vmm_ms)))
        async with alongside(mediated.precopy.keep_small):
            paused = await prepared.vmm.wait_pre_switchover()
        # A guest that stands still does not wait for a link.
        prepared.link.sender.release()
        if not prepared.vmm.guest_ran:
            for device in prepared.devices:
                await self._arm_recovery(prepared, device)
        downtime = Downtime(paused.guest_paused_at, paused.waiting_at)
        downtime.lap("pause")
        budget_s = standstill_budget_s(max(limit_ms, decided_ms))
        self.runner.allow(
            STANDSTILL,
            max(0.0, budget_s - downtime.total_ms / 1e3),
            f"the guest stands still for longer than {budget_s:g} s in all; left were",
        )
        link = prepared.link
        self.runner.offer(
            {
                Action.STOP_DEVICES: partial(self._stop_devices, prepared, mediated.pump, downtime),
                Action.SEND_FINAL: partial(self._send_final, prepared, mediated, downtime),
                Action.VERIFY: partial(self._verify, prepared, mediated, downtime),
                Action.ASK_READY: partial(
                    link.send, MessageKind.ASK, Notice({"guest": prepared.vmm.guest_was}).pack()
                ),
                Action.RELEASE: partial(self._release, prepared, downtime),
                Action.SEND_COMMIT: partial(link.send, MessageKind.COMMIT, flush=True),
                Action.NOTE_MOVED: partial(self._note_moved, prepared),
                Action.CONCLUDE: partial(self._conclude, prepared, downtime),
            }
        )
        return Event.PAUSED

    # --- the guest stands still ---

    async def _stop_devices(
        self, prepared: Prepared, pump: RegisterPump, downtime: Downtime
    ) -> Event:
        await pump.finish()
        if prepared.platform is not None:
            await prepared.platform.read()
        for device in prepared.devices:
            await device.registers.quiesce()
            await device.gateway.stop(
                fence=device.registers.fence, resume=device.registers.resume_records()
            )
        downtime.lap("device stop")
        # What the VMM does not migrate itself; its devices no longer interrupt it.
        if prepared.platform is None:
            await prepared.vmm.settle()
        else:
            await prepared.link.send(MessageKind.PLATFORM, await prepared.platform.save())
            downtime.lap("PCI save")
        return Event.STOPPED

    async def _send_final(
        self, prepared: Prepared, mediated: Mediated, downtime: Downtime
    ) -> Event:
        """Has the VMM send its last part, which the target's VMM loads, while ours is sent; what
        that one is told of its devices comes after all of the pages, where these are ours."""
        stream, precopy = mediated.stream, mediated.precopy
        took_ms: dict[str, float] = {}

        async def timed(what: str, work: Callable[[], Awaitable[None]]) -> None:
            began = time.monotonic()
            await work()
            took_ms[what] = (time.monotonic() - began) * 1e3

        async def finish_pages() -> None:
            if stream.is_open:
                await stream.tail_began.wait()
            await precopy.finish()
            stream.release_tail()

        async def finish_vmm() -> None:
            stream.hurry()
            await prepared.vmm.continue_switchover()
            await prepared.vmm.wait_completed()
            await prepared.link.loaded.wait()

        async def finish_registers() -> None:
            for device in prepared.devices:
                async for payload in device.registers.final():
                    await prepared.link.send_state(device.number, payload)

        # Before the VMM goes on, which does not know of it.
        await precopy.collect_devices()
        await self._stop_pacing()
        await prepared.link.send(MessageKind.ASK_LOADED)
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(timed, "VMM transfer", finish_vmm)
                nursery.start_soon(timed, "registers", finish_registers)
                nursery.start_soon(timed, "pages", finish_pages)
        vmm_ms = took_ms.pop("VMM transfer")
        downtime.beside_vmm_ms = took_ms
        downtime.lap("final state", {"VMM transfer": vmm_ms})
        return Event.FINAL_SENT

    async def _verify(self, prepared: Prepared, mediated: Mediated, downtime: Downtime) -> Event:
        dirty, proof, stream = mediated.dirty, mediated.proof, mediated.stream
        # The VMM's migration is over, and from the release on nobody else could do it.
        self._nursery.start_soon(self._put_back, prepared)
        section = await prove_equal(
            prepared.link,
            prepared.memory,
            bitmap_to_indices(proof.left(dirty.touched)),
            everything=self._proves_everything(dirty),
        )
        self.report.verification = section | {"rolled_pages": proof.rolled_pages}
        self.report.vmm_stream = stream.report()
        downtime.lap("verify")
        return Event.VERIFIED

    async def _release(self, prepared: Prepared, downtime: Downtime) -> Event:
        self.report.registers = prepared.link.registers
        downtime.lap("ready", prepared.link.ready_ms)
        # The record of the first gateway is the one that decides: once it is written, all are. If
        # this process dies before, that gateway takes the others' devices back.
        for device in reversed(prepared.devices):
            await device.gateway.release(self._session.hex())
        downtime.lap("release")
        return Event.RELEASED

    # --- the ends ---

    async def _note_moved(self, prepared: Prepared) -> None:
        for device in prepared.devices:
            try:
                await device.gateway.moved(self._session.hex())
            except GatewayError as error:
                text = (
                    f"that the guest has moved is not on record at {device.path}: {error}. Its "
                    "gateway stays shut; `vfio-ferry resolve` on the target gives the verdict for "
                    "the one here"
                )
                self._reporter.event("message", text=text)

    async def _conclude(self, prepared: Prepared, downtime: Downtime) -> None:
        downtime.lap("commit", prepared.link.committed_ms)
        report = self.report
        report.downtime_ms = downtime.phases_ms
        report.downtime_total_ms = downtime.total_ms
        report.downtime_own_ms = downtime.own_ms
        report.downtime_vmm_ms = downtime.vmm_ms
        report.beside_vmm_ms = downtime.beside_vmm_ms
        report.duration_s = trio.current_time() - self._began
        report.wire_bytes = prepared.link.wire_bytes()
        report.link = prepared.link.counts()
        self._reporter.event("report", text=report.text(), **report.values())
        if self._options.quit_source:
            try:
                await prepared.vmm.quit()
            except VmmError as error:
                self._reporter.event("message", text=f"the VMM here was not ended: {error}")
            else:
                self.vmm_ended = True
        self.watched = await prepared.link.wait_watched()

    async def _resume_guest(self, vmm: Vmm) -> None:
        state = await resume_source(vmm, self._options.qmp, RECOVERY_DEADLINE_S)
        if state not in RUNNING:
            text = f"The guest is {in_words(state)}, not by this migration, and is left so."
            self._reporter.event("message", text=text)

    async def _restore(self) -> Event:
        await self._undo.run()
        return Event.RESTORED
