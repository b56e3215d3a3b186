"""A profile fitted to a device: where each register is, and which register an access touches.

Owns addresses. What is done with a register is up to `snapshot` and `replay`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sync.registers.errors import ProfileMismatch
from sync.registers.profile.locate import DeviceView, Window
from sync.registers.profile.model import Bank, Profile, Register

UNLISTED = -1
STRADDLES = -2
_REGION_SHIFT = 48


@dataclass(frozen=True, slots=True)
class Place:
    """A register of the profile on this device. Offset (in the region) and size in bytes."""

    index: int
    """Its number in `Layout.places`, and in what `Layout.classify` returns."""
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
        self._starts = _keys(
            np.array([place.region for place in ordered], np.uint64),
            np.array([place.offset for place in ordered], np.uint64),
        )
        self._ends = self._starts + np.array([place.size for place in ordered], np.uint64)
        self._indices = np.array([place.index for place in ordered], np.int32)
        self._region_sizes = np.zeros(max(view.region_sizes, default=0) + 1, np.uint64)
        for region, size in view.region_sizes.items():
            self._region_sizes[region] = min(size, 1 << _REGION_SHIFT)

    def place(self, name: str) -> Place | None:
        """The register of that name, if this device has it."""
        return self._by_name.get(name)

    def members(self, bank: str | None) -> list[Place]:
        """The registers of a bank, or those outside all banks, in the order of the profile."""
        return [place for place in self.places if place.register.bank == bank]

    def structure(self) -> dict[str, str]:
        """Where each base is. The guest's driver knows these addresses: both sides must agree."""
        return {base: window.describe() for base, window in self.windows.items()}

    def inside(self, records: NDArray[Any]) -> NDArray[np.bool_]:
        """Which records lie within a region that the device has."""
        known = records["region"] < len(self._region_sizes)
        sizes = self._region_sizes[np.where(known, records["region"], 0)]
        size = records["size"].astype(np.uint64)
        inside: NDArray[np.bool_] = (
            known & (size <= sizes) & (records["offset"] <= sizes - np.minimum(size, sizes))
        )
        return inside

    def classify(self, records: NDArray[Any]) -> NDArray[np.int32]:
        """The place that each record touches: its index, `UNLISTED`, or `STRADDLES`.

        `records` have passed `inside`. An access straddles if only part of it lies in a register.
        """
        if not len(self._starts):
            return np.full(len(records), UNLISTED, np.int32)
        first = _keys(records["region"].astype(np.uint64), records["offset"])
        end = first + records["size"]
        slot = np.searchsorted(self._starts, first, side="right").astype(np.int64) - 1
        before = np.maximum(slot, 0)
        after = np.minimum(slot + 1, len(self._starts) - 1)
        begins_in = (slot >= 0) & (first < self._ends[before])
        ends_in = begins_in & (end <= self._ends[before])
        reaches_next = (slot + 1 < len(self._starts)) & (end > self._starts[after])
        found = np.where(ends_in, self._indices[before], UNLISTED)
        return np.where(
            (begins_in & ~ends_in) | (~begins_in & reaches_next), STRADDLES, found
        ).astype(np.int32)

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


def _keys(regions: NDArray[np.uint64], offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return (regions << np.uint64(_REGION_SHIFT)) + offsets
