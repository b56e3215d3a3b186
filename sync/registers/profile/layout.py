"""A profile fitted to a device: where each register is, and which register an access touches.

Owns addresses. What is done with a register is up to `snapshot` and `replay`; whole batches of
accesses are looked up by `classifier`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from sync.registers.errors import ProfileMismatch
from sync.registers.profile.locate import DeviceView, Window
from sync.registers.profile.model import Bank, Profile, Register


@dataclass(frozen=True, slots=True)
class Place:
    """A register of the profile on this device. Offset (in the region) and size in bytes."""

    index: int
    """Its number in `Layout.places`, and in what `Classifier.classify` returns."""
    register: Register
    region: int
    offset: int
    size: int

    @property
    def name(self) -> str:
        return self.register.name

    @property
    def end(self) -> int:
        return self.offset + self.size

    def label(self, index: int | None) -> str:
        """The register's name for people, with its index in the bank."""
        return self.name if index is None else f"{self.name}[{index}]"


class Layout:
    """Raises `ProfileMismatch` if the device does not have what the profile requires."""

    def __init__(self, profile: Profile, view: DeviceView) -> None:
        self.profile = profile
        self.view = view
        self.places: list[Place] = []
        self.windows: dict[str, Window] = {}
        for register in profile.registers:
            self._place(register)
        self._by_name = {place.name: place for place in self.places}
        self.banks = self._fit_banks()
        self.kicks = tuple(
            kick
            for kick in profile.kicks
            if kick.bank in self.banks and self._window(kick.base) is not None
        )
        ordered = sorted(self.places, key=lambda place: (place.region, place.offset))
        for left, right in pairwise(ordered):
            if left.region == right.region and left.end > right.offset:
                raise ProfileMismatch(
                    f"profile {profile.name}: on device {view.ids}, the registers "
                    f"'{left.name}' and '{right.name}' overlap"
                )

    def place(self, name: str) -> Place | None:
        """The register of that name, if this device has it."""
        return self._by_name.get(name)

    def members(self, bank: str | None) -> list[Place]:
        """The registers of a bank, or those outside all banks, in the order of the profile."""
        return [place for place in self.places if place.register.bank == bank]

    def structure(self) -> dict[str, str]:
        """Where each base is. The guest's driver knows these addresses: both sides must agree."""
        return {base: window.describe() for base, window in self.windows.items()}

    def touched(self, region: int, offset: int, size: int) -> list[Place]:
        """All registers that have a byte in the range, in the order of their addresses."""
        found = [
            place
            for place in self.places
            if place.region == region and place.offset < offset + size and offset < place.end
        ]
        return sorted(found, key=lambda place: place.offset)

    def _window(self, base: str) -> Window | None:
        if base not in self.windows:
            window = self.view.locate(base)
            if window is None:
                return None
            self.windows[base] = window
        return self.windows[base]

    def _place(self, register: Register) -> None:
        window = self._window(register.base)
        size = 0
        if window is not None:
            room = window.size - register.offset
            size = register.size or min(room, register.max_size)
            size -= size % register.access
            if 0 < size <= room:
                offset = window.offset + register.offset
                index = len(self.places)
                self.places.append(Place(index, register, window.region, offset, size))
                return
        if not register.optional:
            lack = "is too short" if window is not None else "does not exist"
            raise ProfileMismatch(
                f"profile {self.profile.name} does not fit device {self.view.ids}: "
                f"'{register.base}' {lack}, which register '{register.name}' needs; "
                "mark the register as optional or narrow the profile's match"
            )

    def _fit_banks(self) -> Mapping[str, Bank]:
        banks: dict[str, Bank] = {}
        for bank in self.profile.banks:
            needed = [bank.selector]
            if isinstance(bank.count, str):
                needed.append(bank.count)
            if all(self.place(name) for name in needed) and self.members(bank.name):
                banks[bank.name] = bank
        return banks
