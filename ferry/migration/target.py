"""The target's side of one migration: what is done in which phase, in the order of the phases.

Owns the order of things on the target. When which phase begins is decided by `sync.handover`; the
command around it is `ferry.commands.receive`.

Each phase hands what it has made to the next one, as a value, by saying how that one's action is
performed (`HandoverRunner.offer`). The leases that have been taken are noted as they are taken:
they are what has to be fenced, from any phase.
"""

import contextlib
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import trio

from ferry.errors import Mismatch, PeerAborted
from ferry.migration.belonging import compare_places, prove_one_vm
from ferry.migration.check import answer_check
from ferry.migration.conversation import EVENTS
from ferry.migration.device_watch import Verdict, watch_devices
from ferry.migration.handover_runner import HandoverRunner
from ferry.migration.incoming_vmm import IncomingVmm
from ferry.migration.late_memory import LateMemory, check_late_files
from ferry.migration.link_news import tell_link
from ferry.migration.listener import Listener
from ferry.migration.memory_layout import MemoryLayout
from ferry.migration.messages import (
    MessageKind,
    MigrationHello,
    Notice,
    asks_for_check,
    unpack_state,
)
from ferry.migration.phases import Phases
from ferry.migration.receive_options import Options
from ferry.migration.target_devices import Lease, TargetDevice, attach_devices, fence, map_memory
from ferry.migration.tunnel import run_tunnel
from ferry.progress import Reporter
from sync.gateway.engine.records import Terms
from sync.gateway.errors import GatewayError, GatewayLost
from sync.handover.machine import Action, Event, Handover
from sync.handover.states import Deadlines, Role
from sync.memory import GuestMemory
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmError, VmmGone
from sync.vmm.identity import VmmIdentity, identify
from sync.vmm.pci import PciPlatform
from sync.vmm.states import RUNNING, in_words
from sync.vmm.uncarried import check_carried
from transport.receiver import Receiver, ReceiverStatistics
from transport.wire.errors import TransportError

TELL_S = 1.0
"""How long the source may take to hear why this side gives up."""
ANNOUNCE_S = 2.0
"""How long a VMM may take to be told to announce its guest, whatever the end was."""
CONNECT_S = 5.0
"""How long the VMM may take to listen for its stream once it has said that it does."""


@dataclass(frozen=True)
class Checked:
    """What fits the source's greeting here; nothing of it has been touched yet."""

    hello: MigrationHello
    devices: tuple[TargetDevice, ...]
    platform: PciPlatform | None
    """What the VMM keeps of the devices; QEMU only."""


@dataclass
class Arrival:
    """What `receive` reports of a guest that has come."""

    session: str = ""
    began: float = field(default_factory=trio.current_time)
    registers: list[dict[str, Any]] = field(default_factory=list)

    def values(self, statistics: ReceiverStatistics) -> dict[str, Any]:
        """The report as an event has it; `statistics` are the link's."""
        return {
            "session": self.session,
            "duration_s": trio.current_time() - self.began,
            "registers": self.registers,
            "pages": statistics.pages_applied,
            "repeated_pages": statistics.pages_rejected,
            "wire_bytes": {
                "pages": statistics.lane_bytes,
                "vmm_stream": statistics.tunnel_bytes_received,
            },
        }


class Target:
    """The target of one migration: performs the actions that the handover asks for."""

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
        self._options = options
        self._reporter = reporter
        self._nursery = nursery
        self._held = held
        self._link = link
        self._vmm = vmm
        self._leases: list[Lease] = []
        self._start_asked = False
        self._may_ask_devices = False
        self.session = ""
        """The session's name, as the gateways' records have it; '' before a sender has come."""
        self.proof = ""
        """What proves to the source that this session is fenced here, once it is."""
        self.only_check = False
        """The sender asks whether it would work, and nothing else."""
        self.touched = False
        """Something here has been prepared for the guest; before, a sender can be refused."""
        self.watched = Verdict()
        """Whether the devices work for the guest that came."""
        self.arrival = Arrival()
        self.runner = HandoverRunner(
            Handover(Role.TARGET, Deadlines(listening_s=options.wait)),
            {Action.TELL_ABORT: self._refuse, Action.FENCE: self._fence},
            failure_events={Action.FENCE: Event.FENCE_FAILED},
            on_state=Phases(reporter, options.break_at).enter,
        )

    # --- prepare ---

    async def wait_hello(self) -> None:
        """Waits for a sender, and tells the handover of what it wants."""
        try:
            greeting = (await self._link.wait_hello()).payload
        except TransportError as error:
            self.runner.post(Event.PEER_LOST, error)
            return
        self.only_check = asks_for_check(greeting)
        self.runner.offer({Action.CHECK: partial(self._check, greeting)})
        self.runner.post(Event.PEER_CHECKS if self.only_check else Event.PEER_HELLO)

    async def _check(self, greeting: bytes) -> Event:
        """Finds out whether what the source has fits what is here; touches nothing."""
        hello = MigrationHello.unpack(greeting)
        self.session = hello.session
        devices = await attach_devices(
            self._options.gateway, self._options.profile, hello, self._held, self._leases
        )
        await self._vmm.check_target()
        places = await prove_one_vm(
            self._options.gateway,
            [device.gateway for device in devices],
            self._vmm,
            vouched=self._options.vouch_one_vm,
        )
        compare_places(places, [each.place for each in hello.devices])
        layout = MemoryLayout.from_rows(hello.files, hello.layout)
        await check_late_files(self._vmm, devices[0].gateway, layout)
        identity = await identify(self._vmm)
        await check_carried(self._vmm)
        _compare_vmms(identity, Notice(hello.vmm))
        platform = await self._check_platform(bytes.fromhex(hello.platform))
        checked = Checked(hello, devices, platform)
        self.runner.offer(
            {
                Action.ANSWER_CHECK: partial(self._answer_check, identity),
                Action.ENTER_STANDBY: partial(self._enter_standby, checked),
            }
        )
        return Event.CHECKED

    async def _check_platform(self, state: bytes) -> PciPlatform | None:
        platform = await PciPlatform.attach(self._vmm, self._options.qmp)
        if platform is not None:
            self._held.push_async_callback(platform.aclose)
            await platform.compare(state)
        elif state:
            raise Mismatch(
                "the source's VMM has vfio-user-pci devices, the one here has none: start both "
                "VMMs with the same devices"
            )
        return platform

    async def _answer_check(self, identity: VmmIdentity) -> Event:
        async def ignore(_kind: MessageKind, _payload: bytes) -> None:
            """Nothing is to be done with a probe: the transport acknowledges it."""

        listener = Listener(self._link, self.runner, ignore)
        await answer_check(self._link, identity, listener.hear_out)
        return Event.ANSWERED

    async def _enter_standby(self, checked: Checked) -> Event:
        self.touched = True
        hello = checked.hello
        self.arrival = Arrival(hello.session)
        memory, late = await map_memory(checked.devices[0].gateway, hello, self._held)
        for device in checked.devices:
            terms = Terms(device is checked.devices[0], *hello.tokens)
            await device.gateway.standby(hello.session, terms)
        if checked.platform is not None:
            await checked.platform.restore(bytes.fromhex(hello.platform))
        self._held.push_async_callback(self._announce)
        with tempfile.TemporaryDirectory(prefix="vfio-ferry-") as folder:
            path = f"{folder}/vmm.sock"
            await self._vmm.start_incoming(f"unix:{path}")
            with trio.fail_after(CONNECT_S):
                stream = await self._held.enter_async_context(await trio.open_unix_socket(path))
        self.runner.offer(
            {Action.SEND_PREPARED: partial(self._send_prepared, checked, memory, late, stream)}
        )
        return Event.STOOD_BY

    async def _send_prepared(
        self,
        checked: Checked,
        memory: GuestMemory,
        late: LateMemory,
        stream: trio.SocketStream,
    ) -> None:
        incoming = IncomingVmm(self._vmm, checked.platform, late)
        self.runner.offer({Action.MAKE_READY: partial(self._make_ready, checked, incoming)})
        await self._link.accept(b"")
        self.runner.offer(
            {
                Action.TELL_ABORT: partial(self._tell, MessageKind.ABORT),
                Action.TELL_START_FAILED: partial(self._tell, MessageKind.START_FAILED),
            }
        )
        self._link.attach_memory(memory.array, files=memory.files)
        self._nursery.start_soon(tell_link, self._link, self.runner, self._reporter)
        self._nursery.start_soon(self._listen, checked.devices, incoming)
        self._nursery.start_soon(run_tunnel, stream, self._link, self.runner)
        self._nursery.start_soon(self._watch_vmm)

    # --- while the source sends ---

    async def _listen(self, devices: tuple[TargetDevice, ...], incoming: IncomingVmm) -> None:
        async def act(kind: MessageKind, payload: bytes) -> None:
            if kind is MessageKind.STATE:
                number, state = unpack_state(payload, len(devices))
                await devices[number].registers.receive(state)
            elif kind is MessageKind.PLATFORM:
                incoming.platform_state = payload
            elif kind is MessageKind.ASK_LOADED:
                self._nursery.start_soon(self._answer_loaded, incoming)
            elif kind is MessageKind.ASK:
                incoming.guest_was = Notice.unpack(payload).guest_state()
                await self.runner.tell(EVENTS[Role.TARGET][kind])
            elif kind is MessageKind.ABORT:
                reason = Notice.unpack(payload).text("reason")
                error = PeerAborted(f"the source gave up: {reason}")
                await self.runner.tell(Event.PEER_ABORTED, error)
            else:
                await self.runner.tell(EVENTS[Role.TARGET][kind])

        await Listener(self._link, self.runner, act).run()

    async def _watch_vmm(self) -> None:
        """Gives up when the VMM is gone: there is nothing to receive for any more."""
        try:
            await self._vmm.wait_gone()
        except VmmError as error:
            self.runner.post(Event.FAILED, error)

    async def _answer_loaded(self, incoming: IncomingVmm) -> None:
        try:
            await incoming.wait_loaded()
            await self._link.send_record(MessageKind.LOADED, b"")
            # Now, while the source compares the memories.
            await incoming.complete_platform()
        except TransportError as error:
            self.runner.post(Event.PEER_LOST, error)
        except Exception as error:
            self.runner.post(Event.FAILED, error)

    # --- switchover ---

    async def _make_ready(self, checked: Checked, incoming: IncomingVmm) -> Event:
        await incoming.wait_loaded()
        reports = [asdict(await device.registers.finish()) for device in checked.devices]
        self.arrival.registers = reports
        began = time.monotonic()
        await incoming.complete_platform()
        took_ms = {"PCI restore": (time.monotonic() - began) * 1e3}
        ready = Notice({"registers": reports, "ms": took_ms}).pack()
        started_ms: dict[str, float] = {}
        self.runner.offer(
            {
                Action.SEND_READY: partial(self._link.send_record, MessageKind.READY, ready),
                Action.OWN: partial(self._own, checked, incoming, started_ms),
                Action.START_GUEST: partial(
                    self._start_guest, checked.devices, incoming, started_ms
                ),
                Action.SEND_COMMITTED: partial(self._send_committed, started_ms),
            }
        )
        return Event.MADE_READY

    async def _own(
        self, checked: Checked, incoming: IncomingVmm, took_ms: dict[str, float]
    ) -> Event:
        """Writes the ownership records, that of the first gateway last: it is the one that decides,
        and once it is written, all are."""
        began = time.monotonic()
        ran = incoming.guest_was in RUNNING
        for device in reversed(checked.devices):
            records = device.registers.start_records()
            await device.gateway.own(checked.hello.session, records, ran=ran)
        took_ms["own"] = (time.monotonic() - began) * 1e3
        return Event.OWNED

    async def _start_guest(
        self,
        devices: tuple[TargetDevice, ...],
        incoming: IncomingVmm,
        took_ms: dict[str, float],
    ) -> Event:
        began = time.monotonic()
        self._start_asked = True
        # The first gateway puts it on record that the guest may run, before any device does.
        for device in devices:
            await device.gateway.start()
        started = time.monotonic()
        if incoming.guest_was in RUNNING:
            await self._vmm.resume()
            self._may_ask_devices = True
        else:
            text = f"The guest is {in_words(incoming.guest_was)}, as at the source, and left so."
            self._reporter.event("message", text=text)
        took_ms["device start"] = (started - began) * 1e3
        took_ms["VMM resume"] = (time.monotonic() - started) * 1e3
        with contextlib.suppress(GatewayError):
            await devices[0].gateway.running(self.session)
        return Event.STARTED

    async def _send_committed(self, took_ms: dict[str, float]) -> None:
        with trio.move_on_after(TELL_S), contextlib.suppress(TransportError):
            notice = Notice({"ms": took_ms}).pack()
            await self._link.send_record(MessageKind.COMMITTED, notice, flush=True)

    async def _announce(self) -> None:
        """Tells the network of the guest; a VMM whose stream broke off meanwhile has ended."""
        with trio.move_on_after(ANNOUNCE_S), contextlib.suppress(VmmError):
            await self._vmm.announce()

    async def watch_devices(self) -> None:
        """Looks whether the devices work for the guest that runs here, and tells the source."""
        if self._options.watch_device and self._may_ask_devices:
            gateways = [lease.gateway for lease in self._leases]
            self.watched = await watch_devices(gateways, self._options.watch_device)
        notice = Notice({"devices": self.watched.state.word, "text": self.watched.text[:1000]})
        with trio.move_on_after(TELL_S), contextlib.suppress(TransportError):
            await self._link.send_record(MessageKind.WATCHED, notice.pack(), flush=True)

    # --- the ways out ---

    async def _fence(self) -> Event:
        """Makes sure that no message whatsoever can start the guest here from this session."""
        fenced, lost = await fence(self._leases, start_asked=self._start_asked)
        if fenced and self._leases and not isinstance(lost, GatewayLost):
            self.proof = (await self._leases[0].gateway.verdict(self.session)).proof
        if lost is not None and isinstance(self.runner.first_error, VmmGone):
            # A VMM does not always outlive its device: that is what went wrong first.
            self.runner.first_error = lost
        return Event.FENCED if fenced else Event.MAY_HAVE_RUN

    async def _refuse(self) -> None:
        """Tells a source that has not been accepted why this side gives up."""
        with trio.move_on_after(TELL_S), contextlib.suppress(TransportError):
            await self._link.refuse(self._reason())

    async def _tell(self, kind: MessageKind) -> None:
        """Tells a source that has been accepted why this side gives up."""
        with trio.move_on_after(TELL_S), contextlib.suppress(TransportError):
            await self._link.send_record(kind, self._reason(), flush=True)

    def _reason(self) -> bytes:
        return Notice({"reason": self.runner.reason[:1000]}).pack()


def _compare_vmms(ours: VmmIdentity, theirs: Notice) -> None:
    for what, here, there in (
        ("VMM", ours.name, theirs.text("name")),
        ("machine type", ours.machine, theirs.text("machine")),
    ):
        if here != there:
            raise Mismatch(
                f"the {what} is {here!r} here, {there!r} at the source: start the same one"
            )
