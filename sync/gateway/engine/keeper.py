"""What the gateway keeps of its device, so that the guest can go on with another process of it.

Sans-IO. Owned here: what the driver has written (`sync.registers.written`), what is under way in
the device's rings (`sync.queues.split_ring`), and by what the device is known again. All of it has
a plain form, for a gateway that hands its device on. Not owned: how a device is brought back
(`comeback`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sync.gateway.datapath.dma import DmaFault, DmaMemory
from sync.gateway.engine.device_handshake import DeviceFacts
from sync.queues.split_ring import SplitRing
from sync.registers.errors import Difference
from sync.registers.find import Origin, find_profile
from sync.registers.profile.layout import Layout
from sync.registers.profile.locate import DeviceView
from sync.registers.snapshot import Values, bank_count, constants
from sync.registers.written import Written

LOOK_S = 0.002
"""A ring is looked at so often while anything is under way in it: with 256 descriptors, 128,000
requests a second are followed."""
_MAX_RING = 1 << 15


class Keeper:
    """Of the device that `layout` fits. `initial` is what its registers held when it came, which
    is what they hold unless a reset is seen; `facts` what it said of itself."""

    def __init__(
        self, layout: Layout, memory: DmaMemory, facts: DeviceFacts, initial: Values
    ) -> None:
        self.layout = layout
        self.written = Written(layout)
        self.written.load(initial)
        self.armed = False
        """Whether the rings have to be looked at every `LOOK_S`."""
        self.identity = identity(layout, facts, initial)
        self._initial = initial
        self._memory = memory
        self._rings: dict[tuple[int, int, int], SplitRing] = {}
        self._revision = self._resets = -1
        self._new = False
        """Whether the rings were set up by a driver that was seen to begin."""

    def write(self, region: int, offset: int, data: bytes) -> None:
        """The driver is about to write a register."""
        self.armed = True
        resets = self.written.resets
        self.written.write(region, offset, data)
        if resets != self.written.resets:
            self._new = True

    def reset(self) -> None:
        self.written.reset()
        self._new = True

    def executed(self, region: int, offset: int, data: bytes) -> None:
        """A register was written for the driver: it is where another one's device stood."""
        self.armed = True
        self.written.write(region, offset, data)
        self._new = False

    @property
    def rings(self) -> list[SplitRing]:
        """Those that the driver has set up."""
        if self._revision != self.written.revision:
            self._revision = self.written.revision
            if self._resets != self.written.resets:
                self._resets = self.written.resets
                self._rings.clear()
            found = self._find_rings()
            self._rings = {
                where: self._rings.get(where) or SplitRing(self._memory, *where, new=self._new)
                for where in found
            }
        return list(self._rings.values())

    def look(self) -> None:
        """Follows the rings; what is unreadable is nobody's."""
        busy = False
        for ring in self.rings:
            try:
                ring.look()
            except DmaFault:
                continue
            busy |= ring.busy
        self.armed = busy

    def lose_track(self) -> None:
        """The device is another one, or was stopped: what was under way is seen anew."""
        self._rings.clear()
        self._revision = -1
        self._new = False
        self.armed = True

    def offer_again(self) -> bool:
        """What is under way is offered to a device that has not begun; False: it is not known."""
        try:
            return all(ring.offer_again() for ring in self.rings)
        except DmaFault:
            return False

    def plain(self) -> dict[str, Any]:
        """All of it, in what JSON has. The profile goes by its digest."""
        return {
            "profile": self.layout.profile.digest(),
            "initial": [
                [self.layout.places[index].name, bank, value.hex()]
                for (index, bank), value in self._initial.items()
            ],
            "written": self.written.plain(),
        }

    def _find_rings(self) -> list[tuple[int, int, int]]:
        """Address of the available and of the used ring, and the number of descriptors."""
        found = []
        written = self.written
        for ring in self.layout.profile.rings:
            bank = self.layout.banks.get(ring.bank)
            if bank is None:
                continue
            for index in range(bank_count(self.layout, bank, self._initial)):
                if any(written.number(name, index) != value for name, value in ring.when):
                    continue
                size = written.number(ring.size, index) or self._first(ring.size, index)
                if 0 < size <= _MAX_RING:
                    available, used = (
                        written.number(n, index) for n in (ring.available, ring.used)
                    )
                    found.append((available, used, size))
        return found

    def _first(self, name: str, index: int) -> int:
        place = self.layout.place(name)
        return (
            int.from_bytes(self._initial.get((place.index, index), b""), "little") if place else 0
        )


def revive(
    plain: Mapping[str, Any], memory: DmaMemory, facts: DeviceFacts, origins: Sequence[Origin]
) -> Keeper | None:
    """The keeper of which another process has made `plain`; None: it did so by another profile.
    What is under way is seen anew."""
    view = view_of(facts)
    profile = find_profile(view, origins)
    if profile is None or profile.digest() != plain["profile"]:
        return None
    layout = Layout(profile, view)
    initial = {}
    for name, bank, value in plain["initial"]:
        place = layout.place(name)
        assert place is not None
        initial[place.index, bank] = bytes.fromhex(value)
    keeper = Keeper(layout, memory, facts, initial)
    keeper.written.take(plain["written"])
    keeper.lose_track()
    return keeper


def view_of(facts: DeviceFacts) -> DeviceView:
    """A device as profiles see it."""
    identity = facts.identity
    return DeviceView(
        vendor=identity.vendor,
        device=identity.device,
        subsystem_vendor=identity.subsystem_vendor,
        subsystem=identity.subsystem,
        class_code=identity.class_code,
        config_space=facts.config_space,
        region_sizes={index: region.size for index, region in facts.regions.items()},
        v2=facts.supports.v2,
        precopy=facts.supports.precopy,
    )


def description(facts: DeviceFacts) -> dict[str, str]:
    """What a device says of itself: who it is, and how it is built."""
    found = facts.identity
    return {
        "vendor and device": f"{found.vendor:04x}:{found.device:04x}",
        "subsystem": f"{found.subsystem_vendor:04x}:{found.subsystem:04x}",
        "class": f"{found.class_code:06x}",
        **{f"region {n}": f"{each.size:#x} bytes" for n, each in facts.regions.items()},
        **{f"interrupt type {n}": f"{each.count} vectors" for n, each in facts.irqs.items()},
    }


def identity(layout: Layout, facts: DeviceFacts, values: Values) -> dict[str, str]:
    """By what a device is known again: its description, and what never changes in it."""
    comeback = layout.profile.comeback
    kept = constants(layout, values)
    for name in comeback.same if comeback else ():
        place = layout.place(name)
        if place is not None:
            kept |= {key: value for key, value in values.items() if key[0] == place.index}
    return {
        **description(facts),
        **layout.structure(),
        **{layout.places[index].label(bank): value.hex() for (index, bank), value in kept.items()},
    }


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[Difference]:
    """What makes a device another one than it was."""
    return [
        Difference(name, before.get(name, "nothing"), after.get(name, "nothing"))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
