"""The event loop of the gateway: sockets, timers and the wake-ups, in one thread on one epoll.

Owned here: every socket, which of them are read when, and their end. What a message means is not
decided here: `relay` and `core` take it, and put their answers into the peers, which are flushed
when the event has been handled.

A VMM counts as connected when it has sent a valid VERSION, so that somebody who only tries whether
the socket is alive disturbs nothing. It waits for its answer until the device is there.

The loop outlives whatever is raised in it: an exception costs a client its connection, a message
its answer, or one look of a `_tick`; what the system is short of is asked for again later.
"""

import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sync.errors import SyncError
from sync.gateway.control.info import GatewayInfo, Upgraded, VmmConnection
from sync.gateway.control.peer import ControlPeer
from sync.gateway.control.server import ControlServer
from sync.gateway.datapath.peer import Handler, Peer
from sync.gateway.datapath.relay import Buffer, Send
from sync.gateway.engine import jobs
from sync.gateway.engine.busy_poll import WINDOW_S, BusyPoll, usable_window_s
from sync.gateway.engine.core import Core, Limits
from sync.gateway.engine.device_handshake import MAX_DATA_BYTES
from sync.gateway.engine.device_link import DeviceLink
from sync.gateway.engine.inheritance import (
    Connection,
    Estate,
    Inherited,
    Listening,
    State,
    ownership,
)
from sync.gateway.engine.keeper import LOOK_S
from sync.gateway.engine.listener import Listener
from sync.gateway.engine.opening import Opening
from sync.gateway.engine.records import Records
from sync.gateway.engine.records_file import RecordsFile
from sync.gateway.engine.succession import START_S, Heir
from sync.gateway.engine.vmm_recovery import VmmRecovery
from sync.gateway.errors import (
    AnotherDevice,
    DeviceLost,
    GatewayError,
    Unsupported,
    UpgradeFailed,
    WrongState,
    told,
)
from sync.peer_process import peer_pid, pid_namespace
from sync.registers.find import Origin
from sync.vfio_user.errors import Disconnected, ProtocolError
from sync.vfio_user.framing import close_fds
from sync.vfio_user.protocol import (
    FLAG_REPLY,
    FLAG_TYPE_MASK,
    HEADER_BYTES,
    MAJOR,
    Command,
    Version,
    encode_message,
    message_limit_bytes,
)

if TYPE_CHECKING:
    from sync.vfio.endpoint import HostEndpoint

TICK_S = 0.05
"""Deadlines are kept to within this."""
IDLE_TICKS = 10
"""Without a device or a deadline under way the loop wakes up this much more rarely."""
STANDSTILL_S = 0.5
"""A turn of the loop that takes so much longer than it waits is one in which it stood still."""
RETRY_S = 0.1
"""The pause between two attempts to connect to the device."""
REOPEN_S = 5.0
"""The same for a function of the host that could not be opened."""
GREETING_S = 5.0
"""A VMM that has connected has to say VERSION within this time."""
MAX_CONTROL_CLIENTS = 32
DEFECT_PAUSE_S = 0.01
"""After an exception that nothing else was made for, should it come again at once."""
FULL_BACKLOG_BYTES = 1 << 20
"""With this much not yet taken by one side, what would add to it is no longer read."""

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT
_MESSAGE_BYTES = message_limit_bytes(MAX_DATA_BYTES)


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """Where the gateway's sockets are. `json`: events as JSON lines on stdout, not as text.
    `busy_poll_s`: for how long it polls before it sleeps, at most."""

    vmm_path: Path
    device_path: Path | None
    """None: `host_function` is the device."""
    control_path: Path
    json: bool = False
    busy_poll_s: float = WINDOW_S
    host_function: str = ""
    """Address of a PCI function of the host, which vfio-pci has, with `iommufd:` in front if it is
    to be reached by that; or the absolute path of a device process that moves by its queues."""
    records_path: Path | None = None
    """Where its records are kept; None: beside the control socket, with `.records` behind its
    name."""
    limits: Limits = field(default_factory=Limits)
    origins: tuple[Origin, ...] = ()
    """Profiles of devices; one that none of them knows does not come back when its process dies."""
    passed: Mapping[Path, socket.socket] = field(default_factory=dict)
    """Sockets that a service manager has made, by path: they are used where they fit."""
    heartbeat: Callable[[float], None] = lambda _now: None
    """Called while the loop is alive."""
    observe: Callable[[float, Callable[[], GatewayInfo]], None] = lambda _now, _status: None
    """As `heartbeat`, with the way to ask for the gateway's status."""
    command: tuple[str, ...] = ()
    """What starts the process that takes this one's place; (): none does."""


class Gateway:
    """One gateway: `run` in one thread until `stop`, which may be called from any.

    Raises `SocketInUse`, `RecordsUnusable` or OSError at once if it cannot begin.
    """

    def __init__(
        self,
        options: GatewayOptions,
        log: Callable[..., None],
        heir_of: Inherited | None = None,
    ) -> None:
        """`heir_of`: what was handed on to take the place of another process, which may go on with
        it until `take_over`."""
        self._options = options
        self._log = log
        self._clock = time.monotonic
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._masks: dict[int, int] = {}
        self._stopping = False
        self._device: Peer | HostEndpoint | None = None
        self._twin: Peer | None = None
        self._vmm: Peer | None = None
        self._vmm_deadline: float | None = None
        self._greeting: tuple[int, Version] | None = None
        self._link: DeviceLink | None = None
        self._next: Peer | HostEndpoint | None = None
        """A device that is to take the place of the one that is gone."""
        self._retry_at = 0.0
        self._device_fault = ""
        """Why the device cannot be used; found while its own message was being handled."""
        self._clients: list[ControlPeer] = []
        self._answered: list[ControlPeer] = []
        """Clients that have something to send, or may have something to ask."""
        self._recovery = VmmRecovery(
            self._clock, lambda: self.core.custody.migrations, self._wake_up
        )
        self._opening: Opening[HostEndpoint] = Opening(self._wake_up)
        self._heir: Heir | None = None
        """The process that is to take this one's place."""
        self._heir_ended: Callable[[Upgraded | GatewayError], None] = lambda outcome: None
        self._heir_deadline: float | None = None
        self._held_since: float | None = None
        """Since when the guest waits for it, if it does."""
        self._upgrade_asked = False
        self._inherited_at = 0.0
        self.handed_on = 0
        """The process that has taken this one's place, or 0."""
        self._deaf: set[int] = set()
        """Listeners that are not asked again before the next tick."""
        self._listeners: list[Listener] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch(self._wake, self._woken)
        control = options.control_path
        records_path = options.records_path or control.with_name(f"{control.name}.records")
        try:
            if heir_of is None:
                for path, comes in self._entrances:
                    self._listen(path, comes, Listener(path, options.passed.get(path.absolute())))
                self._records = RecordsFile(records_path)
            else:
                self._inherit_sockets(heir_of, records_path)
        except BaseException:
            if heir_of is None:
                self._close_listeners()
            raise
        records = Records(time.time, self._records.append, self._records.records)
        recover = self._recovery.start
        self.core = Core(options.limits, self._clock, log, recover, records, options.origins)
        self.core.hand_on = self._hand_on
        self.core.sockets = self
        self.core.device_option = _absolute(options.device_path) or options.host_function
        self.core.device_path = self.core.device_option
        self._server = ControlServer(self.core)
        self._looks: tuple[Callable[[float], object], ...] = (
            options.heartbeat,
            lambda now: options.observe(now, self.core.info),
            self._look_for_device,
            self.core.expire,
            self._look_after_vmm,
            self._look_after_clients,
            self._recovery.look,
            self._look_after_heir,
            self._try_again,
            lambda now: self._flush(),
        )
        if heir_of is None:
            self.core.vmm = _listening_at(options.vmm_path)
        else:
            self._inherit(heir_of)

    # --- the loop ---

    def run(self) -> None:
        """Serves until `stop` is called, then closes everything."""
        if not self._inherited_at:
            vmm, control = self._options.vmm_path, self._options.control_path
            self._log("listening", vmm=str(vmm), control=str(control))
        wait = BusyPoll(self._epoll.poll, usable_window_s(self._options.busy_poll_s)).wait
        handlers = self._handlers
        clock = self._clock
        next_tick = 0.0
        wait_s = TICK_S
        turn_at = look_at = clock()
        try:
            while not self._stopping:
                link = self._link
                armed = link is not None and link.keeper is not None and link.keeper.armed
                try:
                    for number, events in wait(
                        min(wait_s, LOOK_S) if armed else wait_s,
                        link is not None and link.relay.awaiting_device,
                    ):
                        handler = handlers.get(number)
                        if handler is not None:
                            handler(events)
                except Exception as error:
                    self._defect(error)
                if self._stopping:
                    break
                now = clock()
                if armed and now >= look_at:
                    self.core.look()
                    look_at = now + LOOK_S
                stood_still_s = now - turn_at - wait_s
                if stood_still_s > STANDSTILL_S:
                    self._forgive(stood_still_s)
                turn_at = now
                if now >= next_tick:
                    wait_s = self._tick(now)
                    next_tick = now + TICK_S
        finally:
            self.close()

    def stop(self) -> None:
        """Has `run` return. May be called from another thread or a signal handler."""
        self._stopping = True
        self._wake_up()

    def upgrade(self) -> None:
        """Has the process be replaced by what its command starts. May be called from another thread
        or a signal handler."""
        self._upgrade_asked = True
        self._wake_up()

    def _wake_up(self) -> None:
        """Has the loop look at what another thread has left for it."""
        with suppress(OSError, ValueError):  # it may have ended meanwhile
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Closes every socket. The VMM and the device see a disconnect, unless another process has
        them."""
        if self._heir is not None:
            self._heir.end()
        for client in list(self._clients):
            self._forget(client.fileno())
            client.close()
        self._clients.clear()
        self._recovery.close()
        self._opening.close()
        self._drop_session()
        if self.core.link is not None:
            if self.handed_on:
                self.core.link.close()
            else:
                self.core.device_lost("the gateway ends")
        self._records.close()
        self._close_listeners()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            if self.handed_on:
                listener.let_go()
            listener.close()
        self._listeners.clear()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
            self._epoll.close()

    def _forgive(self, seconds: float) -> None:
        """This process was stopped, or had no processor: what others owe it is due later."""
        self.core.forgive(seconds)
        if self._vmm_deadline is not None:
            self._vmm_deadline += seconds

    def _tick(self, now: float) -> float:
        """Looks after everything that has a deadline; returns how long to sleep at most."""
        for look in self._looks:
            try:
                look(now)
            except Exception as error:
                self._defect(error)
        core = self.core
        deadlines = self._vmm_deadline is not None or core.busy or core.lease is not None
        return TICK_S if self._device is None or deadlines else TICK_S * IDLE_TICKS

    def _look_for_device(self, now: float) -> None:
        wanted = self._device is None and self._next is None and not self._opening.busy
        if wanted and now >= self._retry_at:
            self._connect_device(now)

    def _look_after_vmm(self, now: float) -> None:
        if self._vmm_deadline is not None and now > self._vmm_deadline:
            self._vmm_gone("it did not say VERSION, or the device was not there in time")

    def _look_after_clients(self, now: float) -> None:
        self._answered.extend(client for client in self._clients if client.wants_write)
        holder = self.core.silent_holder(now)
        if isinstance(holder, ControlPeer):
            self._recovery.blame(holder.take_process())
            self._client_gone(holder, "it kept the guest's device and said nothing")

    def _try_again(self, now: float) -> None:
        """What the system was short of something for."""
        for number in self._deaf:
            self._mask(number, _IN)
        self._deaf.clear()
        for peer in (self._device, self._twin, self._vmm):
            if peer is not None:
                peer.short = False

    def _defect(self, error: Exception) -> None:
        self._log("defect", reason=f"{type(error).__name__}: {error}")
        time.sleep(DEFECT_PAUSE_S)

    def _watch(self, number: int, handler: Callable[[int], None], mask: int = _IN) -> None:
        self._epoll.register(number, mask)
        self._handlers[number] = handler
        self._masks[number] = mask

    def _mask(self, number: int, mask: int) -> None:
        if self._masks.get(number) not in (None, mask):
            self._epoll.modify(number, mask)
            self._masks[number] = mask

    def _forget(self, number: int) -> None:
        if self._handlers.pop(number, None) is not None:
            del self._masks[number]
            with suppress(OSError):  # its end closes it
                self._epoll.unregister(number)

    @property
    def _entrances(self) -> tuple[tuple[Path, Callable[[socket.socket], None]], ...]:
        return (
            (self._options.control_path, self._client_comes),
            (self._options.vmm_path, self._vmm_comes),
        )

    def _listen(
        self, path: Path, comes: Callable[[socket.socket], None], listener: Listener
    ) -> None:
        self._listeners.append(listener)

        def readable(events: int) -> None:
            try:
                sock = listener.accept()
            except OSError as error:
                self._log("cannot-accept", path=str(path), reason=error.strerror)
                self._mask(listener.fileno(), 0)
                self._deaf.add(listener.fileno())
                return
            if sock is None:
                return
            try:
                comes(sock)
            except Exception:
                sock.close()
                raise

        self._watch(listener.fileno(), readable)

    def _woken(self, events: int) -> None:
        with suppress(OSError):
            os.eventfd_read(self._wake)
        for outcome in self._recovery.outcomes():
            self.core.recovered(outcome)
        self._opening.tell()
        self._flush()
        if self._upgrade_asked:
            self._upgrade_asked = False
            self._hand_on(lambda outcome: None)
        if self._held_since is not None:
            self._give()

    # --- the device ---

    def _connect_device(self, now: float) -> None:
        self._retry_at = now + RETRY_S
        if self._options.host_function:
            self._open_function()
            return
        with suppress(OSError):
            peer = _connected(Path(self.core.device_path))
            try:
                self._use_device(peer)
            except OSError:
                peer.close()

    def _open_function(self) -> None:
        awaited = self._link is not None

        def opened(outcome: "HostEndpoint | SyncError") -> None:
            if isinstance(outcome, SyncError):
                if not awaited:
                    self._log("device-unusable", reason=str(outcome))
                self._retry_at = self._clock() + (RETRY_S if awaited else REOPEN_S)
                return
            try:
                self._use_device(outcome)
            except OSError:
                outcome.close()

        self._begin_opening(self.core.device_path, opened)

    def _begin_opening(
        self, address: str, opened: "Callable[[HostEndpoint | SyncError], None]"
    ) -> None:
        def opens() -> "HostEndpoint":
            # Only here: a gateway of a device process stays as small as it is.
            from sync.vfio.endpoint import open_endpoint

            return open_endpoint(address, self._log)

        self._opening.begin(opens, opened)

    def _use_device(self, peer: "Peer | HostEndpoint") -> None:
        """Takes a device; raises OSError if it cannot."""
        if self._link is not None:
            self._use_successor(peer)
            return
        self._watch(peer.fileno(), self._on_device)
        try:
            link = self.core.device_came(peer.send, self._device_ready, peer.local)
            self._watch(link.interrupts.fileno(), lambda _events: link.interrupts.pass_on())
        except Exception as error:
            self._forget(peer.fileno())
            self.core.device_lost(str(error))
            raise
        self._device = peer
        self._link = link
        # So that an endpoint's next process does what the last one left.
        link.relay.keeps |= not isinstance(peer, Peer)
        peer.handler = link.relay.from_device

    def _device_ready(self, error: SyncError | None) -> None:
        link = self._link
        if link is None:
            return
        if error is not None:
            self._device_fault = f"it does not answer as it has to: {error}"
            return
        if link.facts.twin >= 0 and not self._adopt_twin(link):
            self._device_fault = "its twin socket cannot be used"
            return
        identity = link.facts.identity
        self._log("device-connected", vendor=identity.vendor, device=identity.device)
        self._answer_greeting()

    # --- a device that takes the place of one that is gone ---

    def _use_successor(self, peer: "Peer | HostEndpoint") -> None:
        self._set_next(peer)
        successor = self.core.successor_came(peer.send, self._successor_ended, peer.local)
        peer.handler = successor.relay.from_device

    def _set_next(self, peer: "Peer | HostEndpoint") -> None:
        self._watch(peer.fileno(), self._on_next)
        self._next = peer

    def open_next(self, path: str, opened: Callable[[Send | SyncError], None]) -> None:
        def connected(peer: "Peer | HostEndpoint | SyncError") -> None:
            if isinstance(peer, SyncError):
                opened(peer)
                return
            try:
                self._set_next(peer)
            except OSError as error:
                peer.close()
                opened(told(error))
                return
            opened(peer.send)

        if not self._options.host_function:
            connected(_connected(Path(path)))
        elif not self._options.host_function.startswith("/"):
            raise Unsupported("a function of the host has no other process that could replace it")
        elif self._opening.busy:
            raise WrongState("another device is just being connected: try again")
        else:
            self._begin_opening(path, connected)

    def hear_next(self, handler: Handler) -> None:
        assert self._next is not None
        self._next.handler = handler

    def adopt_next(self, path: str) -> None:
        self.core.device_path = path
        self._drop_device()
        self._take_next()

    def drop_next(self) -> None:
        peer, self._next = self._next, None
        if peer is not None:
            self._forget(peer.fileno())
            peer.close()

    def device_gone(self, reason: str) -> None:
        self._device_gone(reason)

    def _on_next(self, events: int) -> None:
        self._exchange(self._next, events, self._next_gone)

    def _next_gone(self, error: SyncError) -> None:
        """What is left of its job says why, and has its connection dropped."""
        if self.core.replacement is not None:
            self.core.replacement.successor_gone(str(error))
        elif self.core.successor is not None:
            gone = DeviceLost(f"the device is gone again: {error}")
            self.core.successor.runner.abort(gone)
        else:
            self.drop_next()

    def _successor_ended(self, error: SyncError | None) -> None:
        if error is None:
            self._take_next()
            return
        if not isinstance(self._next, Peer | None):
            # What it has begun for the guest its next process must not do once more.
            self.core.relic = self._next.relic(only_if_it_went_on=True) or self.core.relic
        pause_s = REOPEN_S if isinstance(error, AnotherDevice) else 10 * RETRY_S
        self._retry_at = self._clock() + pause_s
        self.drop_next()

    def _take_next(self) -> None:
        """The guest's device is the one that has come."""
        peer, self._next = self._next, None
        link = self._link
        assert peer is not None and link is not None
        self._forget(peer.fileno())
        self._device = peer
        self._watch(peer.fileno(), self._on_device)
        peer.handler = link.relay.from_device
        link.adopt(peer.local)
        if link.facts.twin >= 0 and not self._adopt_twin(link):
            self._device_fault = "its twin socket cannot be used"

    def _adopt_twin(self, link: DeviceLink) -> bool:
        number, link.facts.twin = link.facts.twin, -1
        try:
            sock = socket.socket(fileno=number)
        except OSError:
            os.close(number)
            return False
        try:
            self._watch(number, self._on_twin)
        except OSError:
            sock.close()
            return False
        twin = self._twin = Peer(sock, _MESSAGE_BYTES, _nobody)
        twin.handler = _twin_handler(link, twin)
        return True

    def _on_device(self, events: int) -> None:
        self._exchange(self._device, events, self._device_failed)

    def _on_twin(self, events: int) -> None:
        self._exchange(self._twin, events, self._device_failed)

    def _device_failed(self, error: SyncError) -> None:
        self._device_gone(str(error))

    def _device_gone(self, reason: str) -> None:
        was_ready = self.core.ready
        relic = b"" if isinstance(self._device, Peer | None) else self._device.relic()
        if self.core.device_gone(reason, relic):
            self._drop_device()
            self._retry_at = self._clock() + RETRY_S
            return
        self._drop_session()
        self.core.device_lost(reason)
        if not was_ready:
            self._log("device-unusable", reason=reason)
        self._retry_at = self._clock() + (RETRY_S if was_ready else 10 * RETRY_S)

    # --- the VMM ---

    def _vmm_comes(self, sock: socket.socket) -> None:
        if self._vmm is not None:
            sock.close()
            return
        peer = Peer(sock, _MESSAGE_BYTES, self._greeted)
        self._watch(peer.fileno(), self._on_vmm)
        self._vmm = peer
        self.core.vmm = replace(self.core.vmm, pid=peer_pid(sock))
        self._vmm_deadline = self._clock() + GREETING_S

    def _greeted(
        self,
        message_id: int,
        command: int,
        flags: int,
        error: int,
        message: memoryview,
        descriptors: list[int],
    ) -> None:
        close_fds(descriptors)
        if command != Command.VERSION or flags & FLAG_TYPE_MASK == FLAG_REPLY or self._greeting:
            raise ProtocolError("the first message has to be VERSION, and its answer awaited")
        offer = Version.unpack(message[HEADER_BYTES:])
        if offer.major != MAJOR:
            raise ProtocolError(f"version {offer.major}.{offer.minor} is not spoken here")
        self._greeting = (message_id, offer)
        self._vmm_deadline = self._clock() + self._options.limits.device_wait_s
        self._answer_greeting()

    def _answer_greeting(self) -> None:
        if self._greeting is None or self._vmm is None or self._link is None:
            return
        if not self.core.ready:
            return
        message_id, offer = self._greeting
        self._greeting = None
        self._vmm_deadline = None
        answer = self.core.vmm_came(self._vmm.send, offer)
        self._vmm.handler = self._link.relay.from_vmm
        self._vmm.send(encode_message(message_id, Command.VERSION, answer.pack(), reply=True))

    def _on_vmm(self, events: int) -> None:
        self._exchange(self._vmm, events, lambda error: self._vmm_gone(str(error)))

    def _vmm_gone(self, reason: str) -> None:
        """Ends the VMM's session, and has the device connected anew: so it drops the VMM's memory
        and interrupts, keeps its state, and nothing that was under way is left over."""
        if not self.core.custody.vmm_connected:
            self._log("vmm-refused", reason=reason)
            self._drop_vmm()
            return
        self._drop_session()
        self.core.vmm_lost(reason)
        self._connect_device(self._clock())

    def _drop_vmm(self) -> None:
        if self._vmm is not None:
            self.core.vmm = replace(self.core.vmm, pid=0)
            self._forget(self._vmm.fileno())
            self._vmm.close()
            self._vmm = None
        self._greeting = None
        self._vmm_deadline = None

    def _drop_session(self) -> None:
        """Closes the device's sockets, and the VMM's unless it is only waiting for a device."""
        if self.core.custody.vmm_connected or self._stopping:
            self._drop_vmm()
        self._drop_device()
        if self._link is not None:
            self._forget(self._link.interrupts.fileno())
        self._link = None

    def _drop_device(self) -> None:
        for peer in (self._device, self._twin):
            if peer is not None:
                self._forget(peer.fileno())
                peer.close()
        self._device = self._twin = None
        self._device_fault = ""

    # --- what has to be sent, and what may be read ---

    def _exchange(
        self,
        peer: "Peer | HostEndpoint | None",
        events: int,
        gone: Callable[[SyncError], None],
    ) -> None:
        """Sends to `peer` what it takes now, and hands on what it has said; `gone` if it ends."""
        if peer is None:
            return
        try:
            if events & _OUT:
                peer.drain()
            if events & ~_OUT:
                peer.receive()
        except (Disconnected, ProtocolError) as error:
            gone(error)
        self._flush()

    def _flush(self) -> None:
        """Sends what the event that was just handled has left behind, whatever it was."""
        while not self._flush_once():
            pass
        self._choose_what_to_read()

    def _flush_once(self) -> bool:
        """Sends once; False if a connection has ended over it, or the device has answered at once
        what a client asks: either may leave more to be sent."""
        if self._answered:
            self._flush_clients()
        device, twin, vmm, link = self._device, self._twin, self._vmm, self._link
        try:
            if device is not None:
                device.flush()
            if twin is not None:
                twin.flush()
            if self._device_fault:
                raise ProtocolError(self._device_fault)
        except (Disconnected, ProtocolError) as error:
            self._device_gone(str(error))
            return False
        successor = self._next
        if successor is not None:
            try:
                successor.flush()
            except (Disconnected, ProtocolError) as error:
                self._next_gone(error)
                return False
        try:
            if vmm is not None:
                vmm.flush()
            if link is not None and link.relay.vmm_error is not None:
                raise link.relay.vmm_error
        except (Disconnected, ProtocolError) as error:
            self._vmm_gone(str(error))
            return False
        return not self._answered

    def _choose_what_to_read(self) -> None:
        device, vmm, twin, link = self._device, self._vmm, self._twin, self._link
        successor = self._next
        if successor is not None:
            self._mask(successor.fileno(), _IN | _OUT if successor.backlog_bytes else _IN)
        vmm_full = vmm is not None and vmm.backlog_bytes > FULL_BACKLOG_BYTES
        if device is not None:
            self._mask(device.fileno(), _IN | _OUT if device.wants_write else _IN)
        if vmm is not None:
            blocked = vmm_full or (
                device is not None
                and link is not None
                and (device.backlog_bytes > FULL_BACKLOG_BYTES or link.relay.vmm_blocked)
            )
            self._mask(vmm.fileno(), (0 if blocked else _IN) | (_OUT if vmm.wants_write else 0))
        if twin is not None:
            blocked = vmm_full or twin.backlog_bytes > FULL_BACKLOG_BYTES
            self._mask(twin.fileno(), (0 if blocked else _IN) | (_OUT if twin.wants_write else 0))

    # --- control clients ---

    def _client_comes(self, sock: socket.socket) -> None:
        if len(self._clients) >= MAX_CONTROL_CLIENTS:
            sock.close()
            return
        client = ControlPeer(sock, self._answered.append)
        try:
            self._watch(client.fileno(), lambda events: self._on_client(client, events))
        except OSError:
            client.close()
            raise
        self._clients.append(client)

    def _on_client(self, client: ControlPeer, events: int) -> None:
        try:
            if events & ~_OUT and not client.receive():
                self._client_gone(client, "it closed the connection")
        except Exception as error:
            self._client_gone(client, str(told(error)))
        self._answered.append(client)
        self._flush()

    def _flush_clients(self) -> None:
        """Sends replies, then takes the next requests of those who have theirs."""
        while self._answered:
            client = self._answered.pop()
            if client.closed:
                continue
            try:
                if client.wants_write and not client.flush(self._clock()):
                    self._client_gone(client, "it does not read its replies")
                    continue
                request = client.next_request()
                if request is not None:
                    self._server.handle(client, request)
            except Exception as error:
                if not client.closed:
                    self._client_gone(client, str(told(error)))
            if not client.closed:
                mask = (_IN if client.wants_read else 0) | (_OUT if client.wants_write else 0)
                self._mask(client.fileno(), mask)

    def _client_gone(self, client: ControlPeer, reason: str) -> None:
        self._forget(client.fileno())
        client.close()
        self._clients.remove(client)
        self._log("client-gone", role=client.role.value if client.role else "", reason=reason)
        self.core.lease_lost(client)

    # --- another process takes this one's place ---

    def _hand_on(self, ended: Callable[[Upgraded | GatewayError], None]) -> None:
        """Starts the new process; `ended` is told what came of it."""
        try:
            if self._heir is not None:
                raise UpgradeFailed("another process is about to take this one's place already")
            self._check_hand_on()
            heir = Heir(self._options.command)
            try:
                self._watch(heir.fileno(), self._heir_speaks)
            except OSError:
                heir.end()
                raise
        except (UpgradeFailed, OSError) as error:
            self._log("not-upgraded", reason=str(error))
            ended(error if isinstance(error, UpgradeFailed) else UpgradeFailed(str(error)))
            return
        self._heir, self._heir_ended = heir, ended
        self._heir_deadline = self._clock() + START_S

    def _check_hand_on(self) -> None:
        why_not = self.core.why_not_hand_on()
        if self._options.host_function:
            why_not = "a function of the host, or a device that moves by its queues, stays with it"
        elif not self._options.command or os.getpid() == 1:
            why_not = "as process 1 it cannot end; run it below an init (`docker run --init`)"
        elif self._recovery.under_way:
            why_not = "its VMM is being resumed"
        elif self._vmm_deadline is not None:
            why_not = "a VMM is just connecting: try again"
        if why_not:
            raise UpgradeFailed(f"the gateway cannot be replaced: {why_not}")

    def _heir_speaks(self, events: int) -> None:
        assert self._heir is not None
        try:
            self._heir.greet()
        except UpgradeFailed as error:
            self._stay(error)
        else:
            self._forget(self._heir.fileno())
            self._heir_deadline = self._clock() + self._options.limits.device_deadline_s
            self.core.when_idle(self._hold)
        self._flush()

    def _look_after_heir(self, now: float) -> None:
        if self._heir_deadline is not None and now > self._heir_deadline:
            self._stay(UpgradeFailed("the new process, or the device, did not answer in time"))

    def _hold(self) -> None:
        """Holds the guest's accesses back, and waits until the device has answered all that are
        under way."""
        if self._heir is None:
            return
        self._heir_deadline = None
        link, since = self._link, self._clock()

        def quiet(_: object) -> None:
            if link is not None:
                link.relay.hold()
            self._held_since = since
            os.eventfd_write(self._wake, 1)

        if link is None or not self.core.ready:
            quiet(None)
        else:
            self.core.run(jobs.barrier(), quiet, self._stay, held=True)

    def _give(self) -> None:
        """Between two messages: the new process gets everything, or this one goes on."""
        heir, since, link = self._heir, self._held_since, self._link
        assert heir is not None and since is not None
        self._held_since = None
        self._flush()
        try:
            self._check_hand_on()
            if self.core.busy:
                raise UpgradeFailed("the device is at work: try again")
            estate = Estate()
            heir.hand_on(self._state(estate, since), estate.files)
        except Exception as error:
            self._stay(told(error))
            if link is not None and link is self._link:
                link.relay.let_go()
            self._flush()
            return
        # What the kernel has told of a socket meanwhile is the other process's to read.
        self._handlers.clear()
        self._stopping = True
        self._heir = None
        heir.leave()
        self.handed_on = heir.pid
        self._log("handed-on", pid=heir.pid)
        self._heir_ended(Upgraded(heir.pid))
        self._flush_clients()

    def _stay(self, error: SyncError) -> None:
        """Nothing comes of it; the new process is dead before anything goes on here."""
        heir, self._heir = self._heir, None
        self._heir_deadline = None
        if heir is not None:
            self._forget(heir.fileno())
            heir.end()
            self.answer_for()
            self._log("not-upgraded", reason=str(error))
            self._heir_ended(
                error if isinstance(error, GatewayError) else UpgradeFailed(str(error))
            )

    def _state(self, estate: Estate, since: float) -> State:
        core, link, device, twin = self.core, self._link, self._device, self._twin
        control, vmm = self._listeners

        def listening(listener: Listener) -> Listening:
            return Listening(estate.put(listener.fileno()), listener.identity)

        state = State(
            vmm_path=str(self._options.vmm_path.absolute()),
            control_path=str(self._options.control_path.absolute()),
            device_path=_absolute(self._options.device_path),
            device_path_now=self.core.device_path,
            vmm_listener=listening(vmm),
            control_listener=listening(control),
            records=estate.put(self._records.fileno()),
            ownership=ownership(core.custody),
            last_recovery=core.last_recovery,
            vmm=core.vmm,
            orphaned=core.orphaned,
            generation=core.generation,
            held_since=since,
        )
        if link is None or not core.ready or not isinstance(device, Peer):
            return state
        return replace(
            state,
            link=estate.link(link, twin.send if twin else None),
            device=estate.connection(device),
            twin=estate.connection(twin) if twin else None,
            vmm_connection=estate.connection(self._vmm, link.relay.held()) if self._vmm else None,
        )

    def _inherit_sockets(self, heir: Inherited, records_path: Path) -> None:
        """Raises `UpgradeFailed` if this process was told of other places."""
        state, options = heir.state, self._options
        for option, ours, theirs in (
            ("--control", str(options.control_path.absolute()), {state.control_path}),
            ("--listen", str(options.vmm_path.absolute()), {state.vmm_path}),
            (
                "--device",
                _absolute(options.device_path),
                {state.device_path_now, state.device_path},
            ),
        ):
            if ours not in theirs:
                was = " or ".join(sorted(theirs))
                raise UpgradeFailed(f"{option} is {ours} in its command, and was {was}")
        places = (state.control_listener, state.vmm_listener)
        for (path, comes), place in zip(self._entrances, places, strict=True):
            passed = socket.socket(fileno=heir.file(place.socket))
            self._listen(path, comes, Listener(path, passed, place.identity))
        self._records = RecordsFile(records_path, heir.file(state.records))

    def _inherit(self, heir: Inherited) -> None:
        state = heir.state
        self._inherited_at = state.held_since
        self.core.device_path = state.device_path_now

        def connected(was: Connection | None, on_event: Callable[[int], None]) -> Peer | None:
            if was is None:
                return None
            peer = Peer(socket.socket(fileno=heir.file(was.socket)), _MESSAGE_BYTES, _nobody)
            peer.take(heir.chunks(was.arrived), heir.chunks(was.leaving))
            self._watch(peer.fileno(), on_event)
            return peer

        device = self._device = connected(state.device, self._on_device)
        twin = self._twin = connected(state.twin, self._on_twin)
        vmm = self._vmm = connected(state.vmm_connection, self._on_vmm)
        to_device = device.send if device else _to_nobody
        to_twin = twin.send if twin else to_device
        self.core.adopt(heir, to_device, to_twin, vmm.send if vmm else None)
        link = self._link = self.core.link
        if link is None or device is None:
            return
        self._watch(link.interrupts.fileno(), lambda _events: link.interrupts.pass_on())
        device.handler = link.relay.from_device
        if twin is not None:
            twin.handler = _twin_handler(link, twin)
        if vmm is not None:
            vmm.handler = link.relay.from_vmm

    def answer_for(self) -> None:
        """Who connects sees this process at the other end."""
        for listener in self._listeners:
            listener.answer_for()

    def take_over(self) -> None:
        """From here on this process is the gateway."""
        pause_ms = (self._clock() - self._inherited_at) * 1e3
        self.core.log_state("took-over", pause_ms=round(pause_ms, 3))
        for peer, gone in (
            (self._device, self._device_gone),
            (self._twin, self._device_gone),
            (self._vmm, self._vmm_gone),
        ):
            try:
                if isinstance(peer, Peer):
                    peer.deliver()
                    peer.drain()
            except (Disconnected, ProtocolError) as error:
                gone(str(error))
        self._flush()


def _listening_at(path: Path) -> VmmConnection:
    status = path.stat()
    return VmmConnection(
        path=str(path.absolute()),
        device=status.st_dev,
        inode=status.st_ino,
        pid_namespace=pid_namespace(),
    )


def _connected(path: Path) -> Peer:
    """Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return Peer(sock, _MESSAGE_BYTES, _nobody)


def _twin_handler(link: DeviceLink, twin: Peer) -> Handler:
    def from_twin(
        message_id: int,
        command: int,
        flags: int,
        error: int,
        message: memoryview,
        descriptors: list[int],
    ) -> None:
        close_fds(descriptors)
        link.relay.from_twin(message_id, command, flags, message, twin.send)

    return from_twin


def _absolute(path: Path | None) -> str:
    return str(path.absolute()) if path is not None else ""


def _to_nobody(message: Buffer, descriptors: Sequence[int]) -> None:
    close_fds(list(descriptors))


def _nobody(*_: object) -> None:
    raise ProtocolError("a message before anything was asked")
