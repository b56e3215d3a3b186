"""What a driver has written to its device: enough to bring another process of the device there.

Sans-IO. Owned here: the last value of each register that the driver wrote, by its profile, and what
is written to a fresh device in its place. Not owned: who reads and writes (`snapshot` has the
plans), and what is under way in rings (`sync.queues.split_ring`).

It costs an access one look into a table: what a register is is judged once for each way to write
it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sync.registers.errors import RegisterError
from sync.registers.profile.layout import Layout, Place
from sync.registers.profile.model import Register, RegisterClass, Unlisted
from sync.registers.record import Access, Op
from sync.registers.snapshot import Key, Values, held_bits, kicks

MAX_REMEMBERED = 1 << 14
"""Different doorbells, and different registers of the others: no device has more."""
_SELECTED = (RegisterClass.SNAPSHOT,)

Write = Callable[[bytes], None]


class Written:
    """By `layout`. `write` and `reset` follow the driver, in the order of its accesses."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.too_much = False
        """Whether something had to be forgotten: it is of no use until the next reset."""
        self.revision = 0
        """Goes up with each write that may change where the device's rings are."""
        self.resets = 0
        """Goes up with each reset: what was set up before is gone."""
        self._bytes: dict[Key, dict[int, int]] = {}
        """By register, what was written by position in it."""
        self._doorbells: dict[tuple[int, int], bytes] = {}
        self._others: dict[tuple[int, int], bytes] = {}
        self._judged: dict[tuple[int, int, int], Write] = {}
        self._selector_of = {
            bank.name: layout.place(bank.selector) for bank in layout.banks.values()
        }

    def write(self, region: int, offset: int, data: bytes) -> None:
        """The driver is about to write `data`."""
        where = (region, offset, len(data))
        act = self._judged.get(where)
        if act is None:
            act = self._judge(*where)
            if len(self._judged) < MAX_REMEMBERED:
                self._judged[where] = act
        act(data)

    def reset(self) -> None:
        """The device was reset as a whole: each register holds what a fresh one does."""
        self.revision += 1
        self.resets += 1
        self.too_much = False
        self._bytes.clear()
        self._doorbells.clear()
        self._others.clear()

    def load(self, values: Values) -> None:
        """As if the driver had written all of `values`."""
        self.reset()
        for key, value in values.items():
            self._bytes[key] = dict(enumerate(value))

    def number(self, name: str, index: int | None) -> int:
        """What was written to a register, 0 for each byte that was not."""
        place = self.layout.place(name)
        if place is None:
            return 0
        written = self._bytes.get((place.index, index), {})
        return int.from_bytes(bytes(written.get(at, 0) for at in range(place.size)), "little")

    def over(self, fresh: Values) -> Values:
        """What the registers hold: `fresh` is what those of a device hold that was just reset."""
        values = dict(fresh)
        for key, written in self._bytes.items():
            if key in values:
                value = bytearray(values[key])
                for at, byte in written.items():
                    value[at] = byte
                values[key] = bytes(value)
        return values

    def start(self, values: Values) -> list[Access]:
        """What starts a device that holds `values` but for the bits that are held back: those that
        are not left off, what was written to registers that cannot be read, the doorbells."""
        profile = self.layout.profile
        left_off = profile.comeback.left_off if profile.comeback else ()
        withheld = {
            (place.region, place.offset)
            for name in left_off
            if (place := self.layout.place(name)) is not None
        }
        writes = [each for each in held_bits(self.layout, values) if each[1:3] not in withheld]
        if left_off:
            return writes
        for remembered in (self._others, self._doorbells):
            writes += [
                Access(Op.WRITE, region, offset, len(data), data)
                for (region, offset), data in remembered.items()
            ]
        rung = self._doorbells.keys()
        return [*writes, *(each for each in kicks(self.layout, values) if each[1:3] not in rung)]

    def plain(self) -> dict[str, Any]:
        """All of it, in what JSON has; `take` takes it back."""
        return {
            "registers": [
                [self.layout.places[index].name, bank, list(written.items())]
                for (index, bank), written in self._bytes.items()
            ],
            "doorbells": _plain(self._doorbells),
            "others": _plain(self._others),
            "too_much": self.too_much,
        }

    def take(self, plain: Mapping[str, Any]) -> None:
        """Raises `RegisterError` if it was made by another profile."""
        self.reset()
        for name, bank, written in plain["registers"]:
            place = self.layout.place(name)
            if place is None:
                raise RegisterError(f"profile {self.layout.profile.name} has no register '{name}'")
            self._bytes[place.index, bank] = {int(at): int(byte) for at, byte in written}
        self._doorbells = _from_plain(plain["doorbells"])
        self._others = _from_plain(plain["others"])
        self.too_much = bool(plain["too_much"])

    # --- what a write means ---

    def _judge(self, region: int, offset: int, size: int) -> Write:
        touched = self.layout.touched(region, offset, size)
        kinds = {place.register.kind for place in touched}
        if RegisterClass.HOLD in kinds:
            return lambda data: self._remember(self._doorbells, region, offset, data)
        if kinds == {RegisterClass.REPLAY} or (
            not touched and self.layout.profile.unlisted is Unlisted.REPLAY
        ):
            return lambda data: self._remember(self._others, region, offset, data)
        copied = [place for place in touched if place.register.kind in _SELECTED]

        def write(data: bytes) -> None:
            self.revision += 1
            for place in copied:
                self._copy(place, offset, data)
            for place in copied:
                self._reset_by_driver(place)

        return write

    def _remember(
        self, kept: dict[tuple[int, int], bytes], region: int, offset: int, data: bytes
    ) -> None:
        if kept.pop((region, offset), None) is None and len(kept) >= MAX_REMEMBERED:
            self.too_much = True
            return
        kept[region, offset] = data

    def _copy(self, place: Place, offset: int, data: bytes) -> None:
        index: int | None = None
        if place.register.bank is not None:
            selector = self._selector_of.get(place.register.bank)
            if selector is None:
                return
            index = self.number(selector.name, None)
            if index >= self.layout.banks[place.register.bank].limit:
                return
        written = self._bytes.setdefault((place.index, index), {})
        first = max(place.offset, offset)
        for at in range(first, min(place.end, offset + len(data))):
            written[at - place.offset] = data[at - offset]

    def _reset_by_driver(self, place: Place) -> None:
        """By the write that the profile names: what is beside the register is as after a reset."""
        reset = self.layout.profile.reset
        if reset is None or place.name != reset.register:
            return
        if self.number(place.name, None) != reset.value:
            return
        self.resets += 1
        base = place.register.base
        self._bytes = {
            key: written for key, written in self._bytes.items() if self._register(key).base != base
        }
        self._doorbells.clear()
        self._others.clear()

    def _register(self, key: Key) -> Register:
        return self.layout.places[key[0]].register


def _plain(kept: Mapping[tuple[int, int], bytes]) -> list[list[Any]]:
    return [[region, offset, data.hex()] for (region, offset), data in kept.items()]


def _from_plain(rows: list[list[Any]]) -> dict[tuple[int, int], bytes]:
    return {(int(region), int(offset)): bytes.fromhex(data) for region, offset, data in rows}
