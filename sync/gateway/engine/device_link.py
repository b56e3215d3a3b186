"""One connection to a device with everything that hangs on it, and what a state means for it.

Owned here: how the parts are put together, and which commands of the VMM are trapped in which
state. It lives as long as the connection, and so does the VMM's: when one goes, both go.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from sync.gateway.datapath.away import Away
from sync.gateway.datapath.bitmap import DirtyBitmap
from sync.gateway.datapath.deferred_reads import DeferredReads
from sync.gateway.datapath.dma import MAX_REGIONS, AtDevice, DmaMemory
from sync.gateway.datapath.dma_service import DmaService
from sync.gateway.datapath.interrupts import Interrupts
from sync.gateway.datapath.journal import Journal
from sync.gateway.datapath.notes import notes
from sync.gateway.datapath.relay import Relay, Send, VmmCommand
from sync.gateway.datapath.snoops import Snoops
from sync.gateway.datapath.traps import Capture, Gate, Watch, reads, refusals
from sync.gateway.engine.custody import CustodyState
from sync.gateway.engine.device_handshake import MAX_DATA_BYTES, DeviceFacts
from sync.gateway.engine.job_runner import JobRunner
from sync.gateway.engine.keeper import Keeper
from sync.vfio_user.protocol import Capabilities, Version


class LocalDevice(Protocol):
    """A device in the gateway's own process, as far as it is more than messages."""

    patience_s: float
    """How much longer than others it may take for its first answer."""
    reason: str
    """Why the command is refused whose reply is being taken."""

    @property
    def pin_ns_per_page(self) -> float:
        """What it takes to show it a page of guest memory."""

    @property
    def holds(self) -> Mapping[str, str]:
        """What it is and holds, by name: what has to be the same on both sides."""

    @property
    def tracks_writes(self) -> bool:
        """Whether it can tell which pages it writes."""

    def start_tracking(self) -> None: ...

    def take_written(self) -> Iterable[int]:
        """Numbers of the pages (IOVA / 4096) written since the last call or the start, in order;
        each once more, for as long as it may still be written."""

    def stop_tracking(self) -> None: ...


class DeviceLink:
    """`generation` numbers the first memory map; it goes on from there with each change."""

    def __init__(
        self,
        to_device: Send,
        clock: Callable[[], float],
        *,
        deadline_s: float,
        journal_records: int,
        generation: int,
        local: LocalDevice | None = None,
    ) -> None:
        self.clock = clock
        self.local = local
        self.facts = DeviceFacts()
        self.memory = DmaMemory(generation)
        self.interrupts = Interrupts()
        self.journal = Journal(journal_records)
        self.relay = Relay(to_device, clock)
        self.runner = JobRunner(self.relay, clock, deadline_s)
        self.runner.explain = lambda: self.local.reason if self.local is not None else ""
        self.service = DmaService(self.relay, self.memory, MAX_DATA_BYTES)
        self.relay.device_command = self.service.handle
        self.snoops = Snoops(self.relay, self.memory, self.interrupts)
        self.gate = Gate(self.relay)
        self.watch = Watch(self.relay)
        self.watched_since = -math.inf
        """When the guest that was awaited here was let at its device (seconds of the clock)."""
        self.deferred = DeferredReads()
        self._capture = Capture(self.relay, self.journal, self.deferred, MAX_DATA_BYTES)
        self.capturing = False
        self.stopped = False
        """Whether the guest is paused and its device at rest: nobody waits for an access."""
        self.tracking_queues = False
        self.logging_page_bytes = 0
        """Granularity of the device's DMA logging, 0 when it is off."""
        self.migration_touched = False
        """Whether the device's migration state may be another than RUNNING."""
        self.state_came = False
        """Whether the device was given its state as a stream: nobody has seen its registers."""
        self.resume_records = b""
        """What to execute when the device is started again here."""
        self.start_records = b""
        """What to execute when the device is started here for the guest that came."""
        self.keeper: Keeper | None = None
        """What has to be known to go on with another process of the device, if that is possible."""
        self.comebacks = 0
        """How often another process of the device has taken its place."""
        self.away: Away | None = None
        """While the device is gone and waited for."""
        self._clock = clock
        self._notes: dict[int, VmmCommand] = {}
        self.relay.vmm_commands = self.snoops.commands

    def attach_vmm(self, to_vmm: Send, offer: Version) -> Version:
        """A VMM has come with `offer`; returns what it is answered."""
        theirs = offer.capabilities
        self.deferred.clear()
        self.relay.to_vmm = to_vmm
        self.service.vmm_max_bytes = min(theirs.max_data_xfer_size, MAX_DATA_BYTES)
        ours = self.facts.capabilities
        return Version(
            major=offer.major,
            minor=min(offer.minor, self.facts.minor),
            capabilities=Capabilities(
                max_msg_fds=ours.max_msg_fds,
                max_data_xfer_size=min(
                    ours.max_data_xfer_size, theirs.max_data_xfer_size, MAX_DATA_BYTES
                ),
                max_dma_maps=min(ours.max_dma_maps, theirs.max_dma_maps, MAX_REGIONS),
                pgsizes=ours.pgsizes & theirs.pgsizes or ours.pgsizes,
                write_multiple=ours.write_multiple and theirs.write_multiple,
            ),
        )

    def keep(self, keeper: Keeper) -> None:
        """From here on what the driver writes is noted in `keeper`."""
        self.keeper = self._capture.note = self.gate.note = keeper
        self._notes = notes(self.relay, keeper)
        self.relay.keeps = True
        self.relay.vmm_commands = self.commands

    @property
    def commands(self) -> dict[int, VmmCommand]:
        """Those of the VMM that are more than relayed in passthrough."""
        return {**self.snoops.commands, **self._notes}

    def adopt(self, local: LocalDevice | None) -> None:
        """The device is `local`, and has been asked everything; None: it is only messages."""
        self.local = local
        if local is not None:
            self.facts.supports = replace(
                self.facts.supports, queues=local.tracks_writes, message=False
            )
            self.facts.holds = dict(local.holds)

    def lose_device(self, hold_s: float, patience_s: float) -> None:
        """The device is gone: from here on the VMM's commands wait for the next one."""
        self.away = away = Away(self.relay, self._clock, hold_s, patience_s)
        self.snoops.away = True
        self.snoops.sharing = AtDevice.NOT
        self.snoops.keep_intx_masked = self.snoops.unmask_pending = False
        self.relay.vmm_commands = {**self.snoops.commands, **away.commands}
        away.under_way(self.relay.lose_device())
        for region in self.memory.regions:
            region.at_device = AtDevice.NOT
        self.untrack()
        self.capturing = self.stopped = self.migration_touched = False
        self.logging_page_bytes = 0
        self.tracking_queues = False
        self.resume_records = self.start_records = b""

    def regain_device(self, to_device: Send, facts: DeviceFacts) -> None:
        """The next device stands where the last one stood: the VMM's commands go there."""
        assert self.away is not None
        away, self.away = self.away, None
        self.snoops.away = False
        self.facts = facts
        self.relay.to_device = to_device
        self.enter(CustodyState.PASSTHROUGH)
        away.go_on()

    def enter(self, state: CustodyState, *, shut: bool = False, vmm_starts: bool = False) -> None:
        """From here on the VMM's commands are treated as `state` says; `shut`: it is not to reach
        the device, and is told so, but for the resets of a VMM that starts."""
        commands = self.commands
        if state is CustodyState.PASSTHROUGH and self.interrupts.tapping:
            commands |= self.watch.commands
        self.stopped = state is CustodyState.STOPPED
        self.snoops.keep_intx_masked = self.stopped
        if self.deferred or self.stopped:
            commands |= reads(self.relay, self.deferred, at_rest=self.stopped)
        if state in (CustodyState.MEDIATED, CustodyState.STOPPED):
            commands |= self._capture.commands if self.capturing else refusals(self.relay)
        elif shut or state in (CustodyState.STANDBY, CustodyState.RELEASED):
            commands |= self.gate.commands
            self.gate.acknowledge = state is CustodyState.STANDBY
            self.gate.acknowledge_reset = vmm_starts or self.gate.acknowledge
            self.gate.dropped = 0
            self.snoops.sharing = AtDevice.NOT
        else:
            self.capturing = False
            self.migration_touched = False
            self.resume_records = self.start_records = b""
            self.snoops.unmask_pending = False
            self.snoops.sharing = AtDevice.DIRECT
        self.relay.vmm_commands = commands

    def track(self, bitmap: DirtyBitmap) -> None:
        """From here on the device's writes by message are marked in `bitmap`; owns it."""
        self.untrack()
        self.service.bitmap = bitmap

    def untrack(self) -> None:
        if self.service.bitmap is not None:
            self.service.bitmap.close()
            self.service.bitmap = None

    def close(self) -> None:
        self.relay.close()
        if self.away is not None:
            self.away.close()
        self.untrack()
        if self.facts.twin >= 0:
            os.close(self.facts.twin)
            self.facts.twin = -1
        self.memory.close()
        self.interrupts.close()
