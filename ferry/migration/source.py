"""The source's side of one migration: what is done in which phase.

Owns the order of things on the source. When which phase begins is decided by `sync.handover`, the
rounds are `ferry.migration.precopy`'s; the command around it is `ferry.commands.send`.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import trio
from numpy.typing import NDArray

from ferry.errors import Mismatch, NotOwner
from ferry.findings import methods_text, ok
from ferry.migration.check import findings_of
from ferry.migration.devices import check_gateway, offer_of, view_of
from ferry.migration.downtime import Downtime
from ferry.migration.handover_runner import HandoverRunner
from ferry.migration.memory_layout import MemoryLayout
from ferry.migration.messages import MessageKind, MigrationHello
from ferry.migration.phases import Phases
from ferry.migration.precopy import Precopy
from ferry.migration.report import Report
from ferry.migration.source_link import SourceLink
from ferry.migration.verification import ProofTime, prove_equal
from ferry.nurseries import alongside, ungrouped
from ferry.progress import Reporter
from sync.dirty.merge import MergedTrackers
from sync.dirty.scan import ScanTracker
from sync.dirty.shared import LoggingTracker, MessageTracker
from sync.dirty.tracker import Tracker, choose_method
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.gateway.errors import DeviceLost, GatewayError, GatewayLost
from sync.handover.machine import Action, Event, Handover
from sync.handover.states import Deadlines, HandoverState, Role
from sync.memory import GuestMemory
from sync.registers.choose import load_profiles, source_for
from sync.registers.interface import SourceRegisters
from sync.vmm.driver import Vmm, resume_source
from sync.vmm.errors import VmmError
from sync.vmm.identity import identify
from sync.vmm.pci import PciPlatform
from transport.kernels.bitmap import bitmap_to_indices
from transport.kernels.digests import scan_changed
from transport.wire.errors import TransportError

PUMP_INTERVAL_S = 0.02
"""How often captured register operations are fetched. The journal holds a second of the densest
access pattern a VMM can make, so this only sets how fresh the target's registers are."""
RECOVERY_DEADLINE_S = 10.0

if TYPE_CHECKING:
    from ferry.migration.send_options import Options


@dataclass
class Device:
    """One device of the guest, with what was chosen for it."""

    path: str
    gateway: GatewayClient
    registers: SourceRegisters
    tracker: Tracker


class Source:
    """The actions of the source. Each method named in `perform` does one phase's work."""

    def __init__(
        self,
        options: "Options",
        reporter: Reporter,
        nursery: trio.Nursery,
        held: contextlib.AsyncExitStack,
    ) -> None:
        """What is opened is put into `held`, which has to be closed when `nursery` has ended."""
        self._held = held
        self._options = options
        self._reporter = reporter
        self._nursery = nursery
        self._session = secrets.token_bytes(16)
        self._devices: list[Device] = []
        self._memory: GuestMemory | None = None
        self._layout = MemoryLayout([], [])
        self._dirty: MergedTrackers | None = None
        self._proof_time: ProofTime | None = None
        self._precopy: Precopy | None = None
        self._vmm: Vmm | None = None
        self._vmm_begun = False
        self._platform: PciPlatform | None = None
        self._begun: list[tuple[int, Device]] = []
        """Devices whose operations are to be fetched, with their numbers."""
        self._pump = trio.CancelScope()
        self._pump_stop = trio.Event()
        self._pump_ended = trio.Event()
        self._pump_ended.set()
        self._downtime = Downtime(0.0, 0.0)
        self._started = trio.current_time()
        self.report = Report(session=self._session.hex())
        # A scan reads all of the guest's memory before the rounds.
        limits = Deadlines(
            mediating_s=options.timeout + 10.0, precopy_s=options.timeout + 60.0, pausing_s=30.0
        )
        machine = Handover(Role.SOURCE, limits)
        self.runner = HandoverRunner(
            machine,
            {
                Action.PREPARE: self._prepare,
                Action.MEDIATE: self._mediate,
                Action.RUN_ROUNDS: self._run_rounds,
                Action.PAUSE_VMM: self._pause_vmm,
                Action.STOP_DEVICES: self._stop_devices,
                Action.SEND_FINAL: self._send_final,
                Action.VERIFY: self._verify,
                Action.ASK_READY: self._ask_ready,
                Action.RELEASE: self._release,
                Action.SEND_COMMIT: self._send_commit,
                Action.TELL_ABORT: self._tell_abort,
                Action.RESTORE: self._restore,
            },
            failure_events={Action.RESTORE: Event.RESTORE_FAILED},
            on_state=Phases(reporter, options.break_at).enter,
        )
        self._link = SourceLink(options, self._session, self.runner, nursery)

    # --- prepare: nothing is touched ---

    async def _prepare(self) -> Event:
        for path in self._options.gateway:
            await self._attach(path)
        self._vmm = await self._held.enter_async_context(await Vmm.connect(self._options.qmp))
        await self._vmm.check_source()
        identity = await identify(self._vmm)
        self._platform = await PciPlatform.attach(self._vmm, self._options.qmp)
        platform = b""
        if self._platform is not None:
            self._held.push_async_callback(self._platform.aclose)
            if self._platform.n_devices != len(self._devices):
                raise Mismatch(
                    f"the VMM has {self._platform.n_devices} vfio-user-pci devices, --gateway was "
                    f"given {len(self._devices)} times: give it once for each of them"
                )
            await self._platform.locate()
            platform = await self._platform.peek()
        assert self._memory is not None
        files, layout = self._layout.rows()
        hello = MigrationHello(
            session=self._session.hex(),
            devices=[
                offer_of(device.gateway.info, await device.registers.offer())
                for device in self._devices
            ],
            layout=layout,
            files=files,
            platform=platform.hex(),
            vmm=asdict(identity),
            check=self._options.check,
        )
        await self._link.open(hello.pack())
        if self._options.check:
            for path, methods in zip(self._options.gateway, self.report.methods, strict=True):
                self._reporter.finding(ok(f"device at {path}", methods_text(**methods)))
            for finding in await findings_of(self._link.sender, identity, self._memory.n_pages):
                self._reporter.finding(finding)
            return Event.CHECKED
        return Event.PREPARED

    async def _attach(self, path: str) -> None:
        """Takes the gateway's lease, and chooses how the device's state and pages move."""
        options = self._options
        gateway = await self._held.enter_async_context(
            await GatewayClient.connect(path, role=ClientRole.SOURCE, session=self._session.hex())
        )
        info = await check_gateway(path, gateway, vmm=True)
        if info.state == "released":
            raise NotOwner(
                f"the gateway at {path} has let go of its guest in session {info.session}: whose "
                "it is now, `vfio-ferry resolve` says, on the target first"
            )
        regions = await gateway.memory()
        try:
            if self._memory is None:
                self._memory = self._held.enter_context(GuestMemory.map(regions))
                self._layout = MemoryLayout.of(regions)
            elif [(r.iova, r.length) for r in regions] != [*self._memory.layout]:
                raise Mismatch(
                    f"the gateway at {path} sees another guest memory than "
                    f"{self._options.gateway[0]}: all gateways have to belong to one VMM"
                )
        finally:
            for region in regions:
                os.close(region.fd)
        view = view_of(info)
        profiles = load_profiles([Path(item) for item in options.profile])
        registers = source_for(view, gateway, profiles, options.registers)
        tracker = self._tracker(gateway, logging=info.supports.logging)
        self._held.push_async_callback(tracker.stop)
        self._devices.append(Device(path, gateway, registers, tracker))
        self.report.methods.append({"registers": registers.method, "dirty": tracker.method})

    def _tracker(self, gateway: GatewayClient, *, logging: bool) -> Tracker:
        assert self._memory is not None
        method = choose_method(self._options.dirty, logging=logging)
        if method == "scan":
            return ScanTracker(self._memory.array, self._scan)
        kind = LoggingTracker if method == "logging" else MessageTracker
        return kind(gateway, self._memory.n_pages)

    def _scan(self, memory: NDArray[np.uint8], seen: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return scan_changed(memory, seen, self._link.sender.seed)

    # --- pre-copy ---

    async def _mediate(self) -> Event:
        assert self._memory is not None and self._vmm is not None
        self._link.sender.attach_memory(
            self._memory.array, cache_bytes=self._options.cache, files=self._memory.files
        )
        self._pump_ended = trio.Event()
        self._nursery.start_soon(self._pump_registers)
        for number, device in enumerate(self._devices):
            await device.gateway.arm_recovery(self._options.qmp, RECOVERY_DEADLINE_S)
            mediation = await device.gateway.mediate(
                tracker=device.tracker.asks_gateway_for,
                page_size=self._options.log_page_size,
                capture=device.registers.capture,
                snapshot=await device.registers.snapshot(),
            )
            async for payload in device.registers.begin(mediation.values, mediation.journal_seq):
                await self._link.send_state(number, payload)
            # Before the tracker starts, which may take long: the journal is of limited size.
            self._begun.append((number, device))
            await device.tracker.start(mediation)
        self._dirty = MergedTrackers([device.tracker for device in self._devices])
        self._proof_time = ProofTime(self._memory, self._options.lanes)
        self._precopy = Precopy(
            self._options,
            self._link,
            self._vmm,
            self._dirty,
            self._predict_proof_ns,
            self.report,
            self._reporter,
        )
        socket_path: str = await self._nursery.start(
            self._link.carry_vmm_stream, self._vmm_stream_is_complete
        )
        # Only now: what a device writes is tracked before the VMM reads the first page.
        self._vmm_begun = True
        await self._vmm.start_outgoing(f"unix:{socket_path}")
        return Event.MEDIATED

    @property
    def _proves_everything(self) -> bool:
        assert self._dirty is not None
        return self._options.verify == "all" or not self._dirty.complete

    async def _predict_proof_ns(self) -> int:
        assert self._dirty is not None and self._proof_time is not None
        return await self._proof_time.predict_ns(
            self._dirty.touched, everything=self._proves_everything
        )

    async def _vmm_stream_is_complete(self) -> bool:
        """If it ends before its time, the target's VMM would fail, too: the reason is here."""
        assert self._vmm is not None
        try:
            await self._vmm.check_migration()
        except VmmError as error:
            self.runner.post(Event.FAILED, error)
            return False
        return True

    async def _pump_registers(self) -> None:
        """Brings captured register operations and device state across while the guest runs."""
        try:
            with self._pump:
                # Ends between two turns: what was taken from a gateway has to be sent.
                while not self._pump_stop.is_set():
                    for number, device in self._begun:
                        async for payload in device.registers.precopy():
                            await self._link.send_state(number, payload)
                    with trio.move_on_after(PUMP_INTERVAL_S):
                        await self._pump_stop.wait()
        except TransportError as error:
            self.runner.post(Event.PEER_LOST, error)
        except Exception as error:
            self.runner.post(Event.FAILED, error)
        finally:
            self._pump_ended.set()

    async def _run_rounds(self) -> Event:
        assert self._precopy is not None
        await self._precopy.converge()
        return Event.CONVERGED

    async def _pause_vmm(self) -> Event:
        """Lets the VMM switch over, and keeps the dirty set small until it does."""
        assert self._vmm is not None and self._precopy is not None
        # The VMM may leave so much of its own for the time when the guest stands still; the rest
        # of the limit is for what follows from it.
        await self._vmm.allow_switchover(max(1, self._options.downtime_limit // 3))
        async with alongside(self._precopy.keep_small):
            paused = await self._vmm.wait_pre_switchover()
        self._downtime = Downtime(paused.guest_paused_at, paused.waiting_at)
        self._downtime.lap("pause")
        return Event.PAUSED

    # --- the guest stands still ---

    async def _stop_devices(self) -> Event:
        self._pump_stop.set()
        await self._pump_ended.wait()
        for device in self._devices:
            await device.registers.quiesce()
            await device.gateway.stop(
                fence=device.registers.fence, resume=device.registers.resume_records()
            )
        self._downtime.lap("device stop")
        await self._send_platform()
        return Event.STOPPED

    async def _send_platform(self) -> None:
        """What the VMM does not migrate itself; its devices no longer interrupt it."""
        assert self._vmm is not None
        if self._platform is None:
            await self._vmm.settle()
            return
        state = await self._platform.save()
        await self._link.send(MessageKind.PLATFORM, state)
        self._downtime.lap("PCI save")

    async def _send_final(self) -> Event:
        """The VMM's last part beside ours; the target's VMM loads it meanwhile."""
        assert self._precopy is not None
        took_ms: dict[str, float] = {}

        async def timed(what: str, work: Callable[[], Awaitable[None]]) -> None:
            began = time.monotonic()
            await work()
            took_ms[what] = (time.monotonic() - began) * 1e3

        await self._link.send(MessageKind.ASK_LOADED)
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(timed, "VMM transfer", self._finish_vmm)
                nursery.start_soon(timed, "registers", self._finish_registers)
                nursery.start_soon(timed, "pages", self._precopy.finish)
        vmm_ms = took_ms.pop("VMM transfer")
        self._downtime.beside_vmm_ms = took_ms
        self._downtime.lap("final state", {"VMM transfer": vmm_ms})
        return Event.FINAL_SENT

    async def _finish_vmm(self) -> None:
        assert self._vmm is not None
        await self._vmm.continue_switchover()
        await self._vmm.wait_completed()
        await self._link.loaded.wait()

    async def _finish_registers(self) -> None:
        for number, device in enumerate(self._devices):
            async for payload in device.registers.final():
                await self._link.send_state(number, payload)

    async def _verify(self) -> Event:
        assert self._dirty is not None and self._memory is not None
        self.report.verification = await prove_equal(
            self._link,
            self._memory,
            bitmap_to_indices(self._dirty.touched),
            everything=self._proves_everything,
        )
        self._downtime.lap("verify")
        return Event.VERIFIED

    async def _ask_ready(self) -> None:
        await self._link.send(MessageKind.ASK)

    async def _release(self) -> Event:
        self.report.registers = self._link.registers
        self._downtime.lap("ready", self._link.ready_ms)
        for device in self._devices:
            await device.gateway.release(self._session.hex())
        self._downtime.lap("release")
        return Event.RELEASED

    async def _send_commit(self) -> None:
        await self._link.send(MessageKind.COMMIT, flush=True)

    # --- the ways out ---

    async def _tell_abort(self) -> None:
        await self._link.tell_abort(str(self.runner.first_error or "the source gave up"))

    async def _restore(self) -> Event:
        """Back to a running guest with its devices in passthrough, from wherever it was.

        A device that is gone does not keep the guest from going on; it is told of in the end.
        """
        self._pump.cancel()
        await self._pump_ended.wait()
        self._link.cut_vmm_stream()
        lost: GatewayError | None = None
        for device in self._devices:
            try:
                await self._restore_device(device)
            except (GatewayLost, DeviceLost) as error:
                lost = error
        # Before, the VMM may be paused or migrating for somebody else's reasons.
        if self._vmm is not None and self._vmm_begun:
            await resume_source(self._vmm, self._options.qmp, RECOVERY_DEADLINE_S)
        for device in self._devices:
            # Not before: until the guest runs, the gateway has to resume it if we die.
            with contextlib.suppress(GatewayLost):
                await device.gateway.disarm_recovery()
        if lost is not None:
            raise lost
        return Event.RESTORED

    async def _restore_device(self, device: Device) -> None:
        info = await device.gateway.status()
        if not info.vmm_connected:
            raise DeviceLost(f"the device behind {device.path} is no longer connected to the VMM")
        if info.state == "released":
            await device.gateway.reclaim(self._session.hex())
        if info.state in ("mediated", "stopped", "released"):
            try:
                await device.registers.rollback()
            finally:
                await device.gateway.passthrough()

    async def close(self, state: HandoverState) -> None:
        """Ends the link, with a goodbye where there is somebody to take it."""
        if state is HandoverState.COMMITTED:
            self._finish_report()
            if self._options.quit_source and self._vmm is not None:
                with contextlib.suppress(VmmError):
                    await self._vmm.quit()
        await self._link.close()

    def _finish_report(self) -> None:
        downtime = self._downtime
        downtime.lap("commit", self._link.committed_ms)
        report = self.report
        report.downtime_ms = downtime.phases_ms
        report.downtime_total_ms = downtime.total_ms
        report.downtime_own_ms = downtime.own_ms
        report.downtime_vmm_ms = downtime.vmm_ms
        report.beside_vmm_ms = downtime.beside_vmm_ms
        report.duration_s = trio.current_time() - self._started
        report.wire_bytes = self._link.wire_bytes()
