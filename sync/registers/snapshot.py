"""Reading a device's registers by its profile, comparing them, and writing them to another device.

Owns the accesses and their order, as lists: pure functions, somebody else executes them. What is
read on a live device leaves no trace: registers that a read would change are not read, and each
selector that is used is written back to what the same batch read from it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sync.registers.errors import Difference, ProfileMismatch, RegisterError, SnapshotFailed
from sync.registers.profile.layout import Layout, Place
from sync.registers.profile.model import Bank, Deferral, RegisterClass, Step
from sync.registers.record import Access, Op, pack_accesses, unpack_accesses

MAX_PLAN_ACCESSES = 1 << 16

Key = tuple[int, int | None]
"""Index of the place, index in its bank."""
Values = dict[Key, bytes]
"""What each register holds, as the device has it in memory: little-endian."""


class _Planned(NamedTuple):
    access: Access
    label: str
    key: Key | None = None
    """Which register the bytes that are read belong to, in the order of the plan."""
    proves: Key | None = None
    """The register which has to read as before."""


class ReadPlan:
    """Accesses that read registers, and what their results mean."""

    def __init__(self, planned: Sequence[_Planned]) -> None:
        if len(planned) > MAX_PLAN_ACCESSES:
            raise ProfileMismatch(
                f"the profile asks for {len(planned)} accesses while the guest waits; "
                f"{MAX_PLAN_ACCESSES} are allowed: list fewer registers or lower a bank's limit"
            )
        self._planned = planned

    def records(self) -> bytes:
        """What to execute, as one batch."""
        return pack_accesses([each.access for each in self._planned])

    def parse(self, results: bytes) -> Values:
        """The values in the executed batch.

        Raises `SnapshotFailed` if the device refused an access or a selector did not stay as it
        was, and `RecordFormatError` or `RegisterError` if these are not the results of this plan.
        """
        collected: dict[Key, bytearray] = {}
        executed = list(unpack_accesses(results))
        if len(executed) != len(self._planned):
            raise RegisterError(f"{len(executed)} results for {len(self._planned)} accesses")
        for planned, done in zip(self._planned, executed, strict=True):
            if done[:4] != planned.access[:4]:
                raise RegisterError(f"the result for {planned.label} is that of another access")
            if done.failed:
                raise SnapshotFailed(
                    f"the device refused to {done.op.name.lower()} {planned.label}: "
                    "does the profile fit it?"
                )
            if planned.proves is not None and done.data != bytes(collected[planned.proves]):
                raise SnapshotFailed(
                    f"{planned.label} did not go back to what it was: the guest used it meanwhile"
                )
            if planned.key is not None:
                collected.setdefault(planned.key, bytearray()).extend(done.data)
        return {key: bytes(value) for key, value in collected.items()}


def probe_plan(layout: Layout) -> ReadPlan:
    """Reads what never changes, and where the selectors stand: harmless at any time."""
    selectors = _selectors(layout)
    return ReadPlan(
        [
            planned
            for place in layout.members(None)
            if place.register.kind is RegisterClass.CONSTANT or place in selectors
            for planned in _read(place)
        ]
    )


def constants(layout: Layout, values: Values) -> Values:
    """Those of `values` that never change."""
    return {
        key: value
        for key, value in values.items()
        if layout.places[key[0]].register.kind is RegisterClass.CONSTANT
    }


def snapshot_plan(layout: Layout, probed: Values) -> ReadPlan:
    """Reads every register that is copied or compared. `probed` is what `probe_plan` read.

    Raises `ProfileMismatch` if a bank is larger than the profile allows.
    """
    return _reading(layout, probed, _is_read)


def final_plan(layout: Layout, probed: Values) -> ReadPlan:
    """`snapshot_plan` for the end: without what only the driver changes, which is replayed."""
    return _reading(
        layout, probed, lambda place: _is_read(place) and not place.register.driver_only
    )


def _reading(layout: Layout, probed: Values, is_wanted: Callable[[Place], bool]) -> ReadPlan:
    selectors = _selectors(layout)
    planned = [each for place in selectors for each in _read(place)]
    for place in layout.members(None):
        if is_wanted(place) and place not in selectors:
            planned += _read(place)
    for bank in layout.banks.values():
        selector = _selector(layout, bank)
        members = [place for place in layout.members(bank.name) if is_wanted(place)]
        for index in range(bank_count(layout, bank, probed)) if members else ():
            planned.append(_Planned(_select(selector, index), selector.name))
            for place in members:
                planned += _read(place, index)
    for place in selectors:
        likely = probed[place.index, None]
        back = Access(Op.WRITE, place.region, place.offset, place.size, likely, write_back=True)
        planned.append(_Planned(back, place.name))
        proof = Access(Op.READ, place.region, place.offset, place.size)
        planned.append(_Planned(proof, place.name, proves=(place.index, None)))
    return ReadPlan(planned)


def carried_plan(layout: Layout, probed: Values) -> ReadPlan:
    """Reads what the driver has negotiated, of which the profile says what it carries."""
    names = {carried.register for carried in layout.profile.carried}
    return _reading(layout, probed, lambda place: place.name in names)


def not_carried(layout: Layout, values: Values) -> list[str]:
    """The bits in `values`, which `carried_plan` read, that the profile does not carry, by name."""
    found = []
    for carried in layout.profile.carried:
        place = layout.place(carried.register)
        names = {bit: name for name, bit in carried.names}
        for (index, of_bank), value in values.items() if place else ():
            if place is None or index != place.index:
                continue
            first = 8 * place.size * (of_bank or 0)
            bits = int.from_bytes(value, "little")
            while bits:
                bit = first + bits.bit_length() - 1
                bits ^= 1 << (bit - first)
                if bit not in carried.bits:
                    name = names.get(bit)
                    found.append(f"{name} (bit {bit})" if name else f"bit {bit}")
    return found


def deferred_plan(layout: Layout) -> ReadPlan:
    """Reads for the guest what registers that a read clears hold; only for a device at rest."""
    return ReadPlan(
        [
            planned._replace(
                access=planned.access._replace(
                    deferred=True, counts=place.register.owed is Deferral.COUNT
                )
            )
            for place in layout.members(None)
            if place.register.owed
            for planned in _read(place)
        ]
    )


def deferred_writes(layout: Layout, values: Values) -> list[Access]:
    """Hands `values`, which `deferred_plan` read at the source, to the guest at the target."""
    writes: list[Access] = []
    for place in layout.members(None):
        if place.register.owed and any(value := values.get((place.index, None), b"")):
            is_count = place.register.owed is Deferral.COUNT
            writes += [
                access._replace(deferred=True, counts=is_count)
                for access, _ in _write(place, None, value)
                if any(access.data)
            ]
    return writes


def bank_count(layout: Layout, bank: Bank, values: Values) -> int:
    """How many registers the bank has. Raises `ProfileMismatch` if it is over the limit."""
    if isinstance(bank.count, int):
        return bank.count
    place = layout.place(bank.count)
    count = int.from_bytes(values[place.index, None], "little") if place else 0
    if count > bank.limit:
        raise ProfileMismatch(
            f"profile {layout.profile.name} allows {bank.limit} {bank.name}, the device has "
            f"{count}: raise 'limit' of the bank if the guest may be held up for that long"
        )
    return count


def compare(layout: Layout, source: Values, target: Values) -> list[Difference]:
    """Registers that have to be equal and are not; bits that are held back are left out."""
    differences: list[Difference] = []
    for key in sorted(source.keys() | target.keys(), key=lambda key: (key[0], key[1] or 0)):
        place = layout.places[key[0]]
        if not place.register.compare:
            continue
        ours, theirs = source.get(key), target.get(key)
        if ours is None or theirs is None or _masked(place, ours) != _masked(place, theirs):
            differences.append(Difference(place.label(key[1]), _hex(ours), _hex(theirs)))
    return differences


def restore_plan(layout: Layout, values: Values) -> list[tuple[Access, str]]:
    """The writes that bring a device that was reset to `values`, each with its register's label.

    Bits that are held back are left out; they are written when the target owns the guest.
    """
    steps = layout.profile.steps or (
        *(Step(bank=bank) for bank in layout.banks),
        Step(rest=True),
    )
    writes: list[tuple[Access, str]] = []
    for step in steps:
        if all(_has_bits(layout, values, name, bits) for name, bits in step.when):
            writes += _step(layout, values, step, steps)
    for place in _selectors(layout):
        writes += _write(place, None, values[place.index, None])
    return writes


def held_bits(layout: Layout, values: Values) -> list[Access]:
    """The writes that set the bits that `restore_plan` and a replay leave out."""
    writes: list[Access] = []
    for place in layout.members(None):
        value = values.get((place.index, None), b"")
        if int.from_bytes(value, "little") & place.register.hold_bits:
            writes.append(Access(Op.WRITE, place.region, place.offset, place.size, value))
    return writes


def kicks(layout: Layout, values: Values) -> list[Access]:
    """The doorbells to ring when a device that holds `values` starts anew."""
    doorbells: list[Access] = []
    for kick in layout.kicks:
        bank = layout.banks[kick.bank]
        window = layout.windows[kick.base]
        offset_at = layout.place(kick.offset)
        conditions = [(layout.place(name), wanted) for name, wanted in kick.when]
        if offset_at is None or any(place is None for place, _ in conditions):
            continue
        for index in range(bank_count(layout, bank, values)):
            if all(
                place is not None and _number(values, place, index) == wanted
                for place, wanted in conditions
            ):
                at = _number(values, offset_at, index) * window.multiplier
                if at + kick.size > window.size:
                    raise RegisterError(
                        f"the doorbell of {kick.bank}[{index}] lies outside {kick.base}"
                    )
                data = index.to_bytes(kick.size, "little")
                doorbells.append(
                    Access(Op.WRITE, window.region, window.offset + at, kick.size, data)
                )
    return doorbells


def _step(
    layout: Layout, values: Values, step: Step, steps: Sequence[Step]
) -> Iterator[tuple[Access, str]]:
    if step.write is not None:
        place = layout.place(step.write)
        if place is not None:
            yield from _write(place, None, _step_value(place, values, step))
    elif step.bank is not None:
        bank = layout.banks.get(step.bank)
        if bank is not None:
            yield from _write_bank(layout, bank, values)
    else:
        done = {other.write for other in steps if other.value is None}
        selectors = _selectors(layout)
        for place in layout.members(None):
            if _is_copied(place) and place.name not in done and place not in selectors:
                yield from _copy(place, None, values)


def _step_value(place: Place, values: Values, step: Step) -> bytes:
    if step.value is not None:
        return step.value.to_bytes(place.size, "little")
    value = values[place.index, None]
    if step.mask is None:
        return value
    return (int.from_bytes(value, "little") & step.mask).to_bytes(place.size, "little")


def _write_bank(layout: Layout, bank: Bank, values: Values) -> Iterator[tuple[Access, str]]:
    selector = _selector(layout, bank)
    members = [place for place in layout.members(bank.name) if _is_copied(place)]
    for index in range(bank_count(layout, bank, values)) if members else ():
        yield _select(selector, index), selector.name
        for place in members:
            yield from _copy(place, index, values)


def _copy(place: Place, index: int | None, values: Values) -> Iterator[tuple[Access, str]]:
    value = values[place.index, index]
    if int.from_bytes(value, "little") != place.register.skip:
        yield from _write(place, index, value)


def _write(place: Place, index: int | None, value: bytes) -> Iterator[tuple[Access, str]]:
    value = _masked(place, value)
    width = place.register.access
    for at in range(0, place.size, width):
        access = Access(Op.WRITE, place.region, place.offset + at, width, value[at : at + width])
        yield access, place.label(index)


def _read(place: Place, index: int | None = None) -> Iterator[_Planned]:
    width = place.register.access
    for at in range(0, place.size, width):
        access = Access(Op.READ, place.region, place.offset + at, width)
        yield _Planned(access, place.label(index), key=(place.index, index))


def _is_copied(place: Place) -> bool:
    return place.register.kind is RegisterClass.SNAPSHOT


def _is_read(place: Place) -> bool:
    return _is_copied(place) or place.register.compare


def _selector(layout: Layout, bank: Bank) -> Place:
    place = layout.place(bank.selector)
    if place is None:
        raise RegisterError(f"bank {bank.name} has no selector on this device")
    return place


def _selectors(layout: Layout) -> list[Place]:
    names = {bank.selector for bank in layout.banks.values()}
    return [place for place in layout.places if place.name in names]


def _select(selector: Place, index: int) -> Access:
    data = index.to_bytes(selector.size, "little")
    return Access(Op.WRITE, selector.region, selector.offset, selector.size, data)


def _masked(place: Place, value: bytes) -> bytes:
    bits = place.register.hold_bits
    if not bits:
        return value
    return (int.from_bytes(value, "little") & ~bits).to_bytes(place.size, "little")


def _has_bits(layout: Layout, values: Mapping[Key, bytes], name: str, bits: int) -> bool:
    place = layout.place(name)
    return place is not None and _number(values, place, None) & bits == bits


def _number(values: Mapping[Key, bytes], place: Place, index: int | None) -> int:
    return int.from_bytes(values[place.index, index], "little")


def _hex(value: bytes | None) -> str:
    if value is None:
        return "nothing"
    if len(value) <= 8:
        return f"{int.from_bytes(value, 'little'):#0{2 + 2 * len(value)}x}"
    return f"{value[:16].hex()}{'...' if len(value) > 16 else ''}"
