"""The target's side of one migration: what is done in which phase.

Owns the order of things on the target. When which phase begins is decided by `sync.handover`; the
command around it is `ferry.commands.receive`.
"""

import contextlib
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from ferry.errors import (
    FerryError,
    Mismatch,
    PeerAborted,
)
from ferry.exit_codes import describe
from ferry.host_memory import check_room
from ferry.migration.check import answer_check
from ferry.migration.conversation import EVENTS
from ferry.migration.devices import check_gateway, offer_of, view_of
from ferry.migration.handover_runner import HandoverRunner
from ferry.migration.listener import Listener
from ferry.migration.memory_layout import MemoryLayout, same_pages
from ferry.migration.messages import (
    MessageKind,
    MigrationHello,
    Notice,
    asks_for_check,
    unpack_state,
)
from ferry.migration.phases import Phases
from ferry.migration.receive_options import Options
from ferry.migration.tunnel import run_tunnel
from ferry.progress import Reporter
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.gateway.errors import DeviceLost, GatewayLost, VmmLost, WrongState
from sync.handover.machine import Action, Event, Handover
from sync.handover.states import Deadlines, Role
from sync.memory import GuestMemory
from sync.registers.choose import load_profiles, target_for
from sync.registers.errors import (
    IdentityMismatch,
    MethodMismatch,
    NoMethod,
    ProfileMismatch,
)
from sync.registers.interface import TargetRegisters
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmError, VmmGone
from sync.vmm.identity import VmmIdentity, identify
from sync.vmm.pci import PciPlatform
from transport.receiver import Receiver
from transport.wire.errors import TransportError

TELL_S = 1.0


CONNECT_S = 5.0


class Target:
    """The actions of the target. Each method named in `perform` does one phase's work."""

    def __init__(
        self,
        options: Options,
        reporter: Reporter,
        nursery: trio.Nursery,
        held: contextlib.AsyncExitStack,
        link: Receiver,
        vmm: Vmm,
    ) -> None:
        """What is opened is put into `held`, which has to be closed when `link` has ended."""
        self._held = held
        self._options = options
        self._reporter = reporter
        self._nursery = nursery
        self._link = link
        self._vmm = vmm
        self._platform: PciPlatform | None = None
        self._platform_state = b""
        self._hello = MigrationHello("", [], [], [])
        self._greeting = b""
        self._accepted = trio.Event()
        self.only_check = False
        """The sender asks whether it would work, and nothing else."""
        self._gateways: list[GatewayClient] = []
        self._registers: list[TargetRegisters] = []
        self._memory: GuestMemory | None = None
        self._vmm_stream: trio.SocketStream | None = None
        self._reports: list[dict[str, Any]] = []
        self._vmm_loaded = False
        self._platform_lock = trio.Lock()
        self._platform_restored = False
        self._ready_ms: dict[str, float] = {}
        self._started_ms: dict[str, float] = {}
        machine = Handover(Role.TARGET, Deadlines(listening_s=options.wait))
        self.runner = HandoverRunner(
            machine,
            {
                Action.CHECK: self._check,
                Action.ANSWER_CHECK: self._answer_check,
                Action.ENTER_STANDBY: self._enter_standby,
                Action.SEND_PREPARED: self._send_prepared,
                Action.MAKE_READY: self._make_ready,
                Action.SEND_READY: self._send_ready,
                Action.OWN: self._own,
                Action.START_GUEST: self._start_guest,
                Action.SEND_COMMITTED: self._send_committed,
                Action.TELL_ABORT: self._tell_abort,
                Action.TELL_START_FAILED: self._tell_start_failed,
                Action.FENCE: self._fence,
            },
            failure_events={Action.FENCE: Event.FENCE_FAILED},
            on_state=Phases(reporter, options.break_at).enter,
        )
        self._listener = Listener(link, self.runner, self._act)

    async def listen(self) -> None:
        """Waits for a sender, then hears it out until the link ends."""
        try:
            self._greeting = (await self._link.wait_hello()).payload
            if asks_for_check(self._greeting):
                self.only_check = True
                self.runner.post(Event.PEER_CHECKS)
                return
            self.runner.post(Event.PEER_HELLO)
            await self._accepted.wait()
            await self._listener.run()
        except (TransportError, FerryError) as error:
            self.runner.post(Event.PEER_LOST, error)
        except Exception as error:
            self.runner.post(Event.FAILED, error)

    async def _act(self, kind: MessageKind, payload: bytes) -> None:
        """What the source says."""
        if kind is MessageKind.STATE:
            number, state = unpack_state(payload, len(self._registers))
            await self._registers[number].receive(state)
        elif kind is MessageKind.PLATFORM:
            self._platform_state = payload
        elif kind is MessageKind.ASK_LOADED:
            self._nursery.start_soon(self._answer_loaded)
        elif kind is MessageKind.ABORT:
            reason = Notice.unpack(payload).text("reason")
            await self.runner.tell(Event.PEER_ABORTED, PeerAborted(f"the source gave up: {reason}"))
        elif kind is not MessageKind.PROBE:
            await self.runner.tell(EVENTS[Role.TARGET][kind])

    # --- prepare ---

    async def _check(self) -> Event:
        """Whether what the source has fits what is here; touches nothing."""
        hello = self._hello = MigrationHello.unpack(self._greeting)
        paths = self._options.gateway
        if len(hello.devices) != len(paths):
            raise Mismatch(
                f"the source has {len(hello.devices)} devices, this side {len(paths)} gateways: "
                "give --gateway once for each device, in the same order on both hosts"
            )
        profiles = load_profiles([Path(item) for item in self._options.profile])
        for number, (path, theirs) in enumerate(zip(paths, hello.devices, strict=True)):
            gateway = await self._held.enter_async_context(
                await GatewayClient.connect(path, role=ClientRole.TARGET, session=hello.session)
            )
            self._gateways.append(gateway)
            info = await check_gateway(path, gateway, vmm=True)
            ours = offer_of(info, b"")
            for what in ("identity", "regions", "irqs"):
                if getattr(ours, what) != getattr(theirs, what):
                    raise Mismatch(
                        f"device {number} has another {what} here: {getattr(ours, what)}, "
                        f"the source's {getattr(theirs, what)}; use the same device with the same "
                        "options on both hosts"
                    )
            try:
                registers = target_for(
                    bytes.fromhex(theirs.registers), view_of(info), gateway, profiles
                )
                await registers.check()
            except (IdentityMismatch, MethodMismatch, NoMethod, ProfileMismatch) as error:
                raise Mismatch(f"device {number}: {error}") from error
            self._registers.append(registers)
            await self._check_memory(gateway)
        await self._vmm.check_target()
        self._check_vmm(await identify(self._vmm))
        self._platform = await PciPlatform.attach(self._vmm, self._options.qmp)
        if self._platform is not None:
            self._held.push_async_callback(self._platform.aclose)
        await self._check_platform()
        return Event.CHECKED

    def _check_vmm(self, ours: VmmIdentity) -> None:
        theirs = Notice(self._hello.vmm)
        for what, here in (("VMM", ours.name), ("machine type", ours.machine)):
            there = theirs.text("name" if what == "VMM" else "machine")
            if here != there:
                raise Mismatch(
                    f"the {what} is {here!r} here, {there!r} at the source: start the same one"
                )

    async def _check_platform(self) -> None:
        state = bytes.fromhex(self._hello.platform)
        if self._platform is not None:
            await self._platform.compare(state)
        elif state:
            raise Mismatch(
                "the source's VMM has vfio-user-pci devices, the one here has none: start both "
                "VMMs with the same devices"
            )

    async def _check_memory(self, gateway: GatewayClient) -> None:
        regions = await gateway.memory()
        try:
            theirs = MemoryLayout.from_rows(self._hello.files, self._hello.layout)
            pages = same_pages(theirs, regions)
            check_room(regions)
            if self._memory is None and not self.only_check:
                self._memory = self._held.enter_context(GuestMemory.map(pages, writable=True))
        finally:
            for region in regions:
                os.close(region.fd)

    async def _answer_check(self) -> Event:
        await answer_check(self._link, await identify(self._vmm), self._listener.hear_out)
        return Event.ANSWERED

    async def _enter_standby(self) -> Event:
        for gateway in self._gateways:
            await gateway.standby(self._hello.session)
        await self._restore_platform(bytes.fromhex(self._hello.platform))
        with tempfile.TemporaryDirectory(prefix="vfio-ferry-") as folder:
            socket_path = f"{folder}/vmm.sock"
            await self._vmm.start_incoming(f"unix:{socket_path}")
            with trio.fail_after(CONNECT_S):
                self._vmm_stream = await self._held.enter_async_context(
                    await trio.open_unix_socket(socket_path)
                )
        return Event.STOOD_BY

    async def _send_prepared(self) -> None:
        assert self._memory is not None and self._vmm_stream is not None
        await self._link.accept(b"")
        self._accepted.set()
        self._link.attach_memory(self._memory.array, files=self._memory.files)
        self._nursery.start_soon(run_tunnel, self._vmm_stream, self._link, self.runner)
        self._nursery.start_soon(self._watch_vmm)

    async def _watch_vmm(self) -> None:
        """Without its VMM there is nothing to receive for, and the source's guest still runs."""
        try:
            await self._vmm.wait_gone()
        except VmmError as error:
            self.runner.post(Event.FAILED, error)

    # --- switchover ---

    async def _answer_loaded(self) -> None:
        try:
            await self._wait_loaded()
            await self._link.send_record(MessageKind.LOADED, b"")
            # Now, while the source compares the memories.
            await self._complete_platform()
        except TransportError as error:
            self.runner.post(Event.PEER_LOST, error)
        except Exception as error:
            self.runner.post(Event.FAILED, error)

    async def _wait_loaded(self) -> None:
        """The VMM is asked once: afterwards nothing changes until we have it resume."""
        if not self._vmm_loaded:
            await self._vmm.wait_loaded()
            self._vmm_loaded = True

    async def _make_ready(self) -> Event:
        await self._wait_loaded()
        self._reports = [asdict(await registers.finish()) for registers in self._registers]
        began = time.monotonic()
        await self._complete_platform()
        self._ready_ms["PCI restore"] = (time.monotonic() - began) * 1e3
        return Event.MADE_READY

    async def _complete_platform(self) -> None:
        """What the source found of the VMM's own when its guest had stopped; once."""
        async with self._platform_lock:
            if not self._platform_restored:
                await self._restore_platform(self._platform_state)
                self._platform_restored = True

    async def _restore_platform(self, state: bytes) -> None:
        """What the VMM itself knows of the devices and does not migrate."""
        if self._platform is not None:
            await self._platform.restore(state)

    async def _send_ready(self) -> None:
        await self._link.send_record(
            MessageKind.READY, Notice({"registers": self._reports, "ms": self._ready_ms}).pack()
        )

    async def _own(self) -> Event:
        """The first gateway's record decides, so it is written last: with it, all are written."""
        began = time.monotonic()
        both = zip(self._gateways, self._registers, strict=True)
        for gateway, registers in reversed(list(both)):
            await gateway.own(self._hello.session, registers.start_records())
        self._started_ms["own"] = (time.monotonic() - began) * 1e3
        return Event.OWNED

    async def _start_guest(self) -> Event:
        began = time.monotonic()
        for gateway in self._gateways:
            await gateway.start()
        started = time.monotonic()
        await self._vmm.resume()
        self._started_ms["device start"] = (started - began) * 1e3
        self._started_ms["VMM resume"] = (time.monotonic() - started) * 1e3
        return Event.STARTED

    async def _send_committed(self) -> None:
        with trio.move_on_after(TELL_S), contextlib.suppress(TransportError):
            await self._link.send_record(
                MessageKind.COMMITTED, Notice({"ms": self._started_ms}).pack(), flush=True
            )

    # --- the ways out ---

    async def _fence(self) -> Event:
        """After this, no message whatsoever can start the guest here from this session."""
        for number, gateway in enumerate(self._gateways):
            try:
                info = await gateway.status()
                if number == 0 and info.owner == "owned" and info.session == self._hello.session:
                    return Event.ALREADY_OWNED
                await gateway.fence(self._hello.session)
                if info.state == "standby":
                    await gateway.abandon()
            except (GatewayLost, DeviceLost, VmmLost) as error:
                # What is gone, or starts anew, holds no standby that could be owned.
                if not isinstance(error, VmmLost) and isinstance(self.runner.first_error, VmmGone):
                    # Its device is gone, too, and a VMM does not always outlive that.
                    self.runner.first_error = error
                continue
            except WrongState:
                # Owned, but not the first: it stays in standby, and nobody will start it.
                continue
        return Event.FENCED

    async def _tell_abort(self) -> None:
        await self._tell(MessageKind.ABORT)

    async def _tell_start_failed(self) -> None:
        await self._tell(MessageKind.START_FAILED)

    async def _tell(self, kind: MessageKind) -> None:
        reason = Notice({"reason": reason_of(self.runner.first_error)[:1000]}).pack()
        with trio.move_on_after(TELL_S), contextlib.suppress(TransportError):
            if self._accepted.is_set():
                await self._link.send_record(kind, reason, flush=True)
            else:
                await self._link.refuse(reason)


def reason_of(error: BaseException | None) -> str:
    return describe(error) if error else "no reason"
