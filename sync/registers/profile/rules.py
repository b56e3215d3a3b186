"""What has to hold between the parts of a register profile.

Owns the rules alone: `toml` has checked each value by itself.
"""

from collections.abc import Iterable
from typing import TypeVar

from sync.registers.errors import ProfileError
from sync.registers.profile.model import (
    MAX_COPIED_BYTES,
    Bank,
    Carried,
    Kick,
    Profile,
    Register,
    RegisterClass,
    Ring,
)

COPIED = (RegisterClass.SNAPSHOT,)
KNOWN = (RegisterClass.SNAPSHOT, RegisterClass.CONSTANT)
"""Classes whose registers are read: what they hold is known on both sides."""
WRITTEN = (RegisterClass.SNAPSHOT, RegisterClass.REPLAY, RegisterClass.WRITE_ONE_TO_CLEAR)
_Named = TypeVar("_Named", Register, Bank)


def check_rules(profile: Profile) -> None:
    """Raises `ProfileError`, which names the part and what is allowed."""
    _Rules(profile).check()


class _Rules:
    """The rules, applied to one profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._registers = _by_name("register", profile.registers)
        self._banks = _by_name("bank", profile.banks)

    def check(self) -> None:
        for register in self._profile.registers:
            self._check_register(register)
        for bank in self._profile.banks:
            self._check_bank(bank)
        self._check_steps()
        for kick in self._profile.kicks:
            self._check_kick(kick)
        for carried in self._profile.carried:
            self._check_carried(carried)
        for ring in self._profile.rings:
            self._check_ring(ring)
        self._check_comeback()
        reset = self._profile.reset
        if reset is not None:
            self._small("[reset]", "register", self._refer("[reset]", reset.register, WRITTEN))

    def _refer(
        self,
        where: str,
        name: str,
        kinds: tuple[RegisterClass, ...],
        bank: str | None = None,
    ) -> Register:
        register = self._registers.get(name)
        if register is None:
            raise ProfileError(f"{where}: there is no register '{name}'")
        if register.kind not in kinds:
            allowed = " or ".join(kinds)
            raise ProfileError(
                f"{where}: register '{name}' is of class {register.kind}; it has to be {allowed}"
            )
        if register.bank != bank:
            place = "outside any bank" if bank is None else f"in the bank '{bank}'"
            raise ProfileError(f"{where}: register '{name}' has to be {place}")
        return register

    @staticmethod
    def _small(where: str, key: str, register: Register) -> None:
        if register.size != register.access:
            raise ProfileError(
                f"{where}: '{key}' needs a register of one access; '{register.name}' is a block"
            )

    def _check_register(self, register: Register) -> None:
        where = f"[[register]] {register.name}"
        if register.bank is not None and register.bank not in self._banks:
            raise ProfileError(f"{where}: there is no bank '{register.bank}'")
        if register.hold_bits:
            self._small(where, "hold_bits", register)
            if register.bank is not None or register.kind not in COPIED:
                raise ProfileError(f"{where}: 'hold_bits' goes with class snapshot, outside banks")
            if register.hold_bits >> (8 * register.access):
                raise ProfileError(f"{where}: 'hold_bits' is wider than the register")
        if register.skip is not None:
            self._small(where, "skip", register)
            if register.kind not in COPIED:
                raise ProfileError(f"{where}: 'skip' goes with class snapshot only")
        copied = register.kind in KNOWN or register.compare
        if copied and (register.size or register.max_size) > MAX_COPIED_BYTES:
            raise ProfileError(
                f"{where}: 'size' (or 'max_size', with size = \"window\") has to be at most "
                f"{MAX_COPIED_BYTES} for a register that is read"
            )
        if register.kind is RegisterClass.CONSTANT and not register.compare:
            raise ProfileError(f"{where}: a constant is always compared; 'compare' cannot be false")
        if register.compare and register.kind in (RegisterClass.READ_TO_CLEAR, RegisterClass.HOLD):
            raise ProfileError(f"{where}: class {register.kind} cannot be read to compare it")
        if register.driver_only:
            self._check_driver_only(where, register)
        if register.owed and (
            register.kind is not RegisterClass.READ_TO_CLEAR or register.bank is not None
        ):
            raise ProfileError(f"{where}: 'owed' goes with class read-to-clear outside banks only")
        if register.reads and register.kind is RegisterClass.HOLD:
            raise ProfileError(f"{where}: reads of class hold are not replayed")

    def _check_driver_only(self, where: str, register: Register) -> None:
        """A register that only the driver changes: nobody asks at the end what it holds."""
        if register.kind not in COPIED or register.hold_bits:
            raise ProfileError(
                f"{where}: 'driver_only' goes with class snapshot without 'hold_bits' only"
            )
        asked = {bank.selector for bank in self._profile.banks}
        asked |= {name for kick in self._profile.kicks for name, _ in kick.when}
        if register.name in asked:
            raise ProfileError(
                f"{where}: 'driver_only' goes neither with a selector nor with the 'when' of a kick"
            )

    def _check_bank(self, bank: Bank) -> None:
        where = f"[[bank]] {bank.name}"
        selector = self._refer(where, bank.selector, COPIED)
        self._small(where, "selector", selector)
        if selector.hold_bits or selector.skip is not None:
            raise ProfileError(f"{where}: a selector cannot have 'hold_bits' or 'skip'")
        self._indexable(where, bank, "selector", selector.access)
        if isinstance(bank.count, str):
            counter = self._refer(where, bank.count, (RegisterClass.CONSTANT,))
            self._small(where, "count", counter)
        elif bank.count > bank.limit:
            raise ProfileError(f"{where}: 'count' is over 'limit'")

    @staticmethod
    def _indexable(where: str, bank: Bank, what: str, width: int) -> None:
        largest = 1 << (8 * width)
        if bank.limit > largest:
            raise ProfileError(
                f"{where}: the {what} has {8 * width} bits; "
                f"'limit' of bank '{bank.name}' has to be at most {largest}"
            )

    def _check_steps(self) -> None:
        steps = self._profile.steps
        if not steps:
            return
        banks = [step.bank for step in steps if step.bank is not None]
        for bank in banks:
            if bank not in self._banks:
                raise ProfileError(f"[[restore]]: there is no bank '{bank}'")
        rests = sum(step.rest for step in steps)
        if len(banks) != len(set(banks)) or rests > 1:
            raise ProfileError("[[restore]]: a bank, or the rest, can be written only once")
        written: set[str] = set()
        for place, step in enumerate(steps, 1):
            where = f"[[restore]] number {place}"
            for name, _ in step.when:
                self._small(where, "when", self._refer(where, name, KNOWN))
            if step.write is None:
                continue
            copied = step.value is None
            register = self._refer(where, step.write, COPIED if copied else WRITTEN)
            if step.value is not None or step.mask is not None:
                self._small(where, "value or mask", register)
            if (step.value or step.mask or 0) >> (8 * register.access):
                raise ProfileError(f"{where}: a value is wider than '{step.write}'")
            if copied:
                written.add(step.write)
        selectors = {bank.selector for bank in self._profile.banks}
        for register in self._profile.registers:
            if register.kind not in COPIED or register.name in written | selectors:
                continue
            if register.bank is None and not rests:
                raise ProfileError(
                    f"[[restore]]: no step writes register '{register.name}'; add rest = true"
                )
            if register.bank is not None and register.bank not in banks:
                raise ProfileError(f"[[restore]]: no step writes the bank '{register.bank}'")

    def _check_carried(self, carried: Carried) -> None:
        register = self._registers.get(carried.register)
        bank = register.bank if register else None
        register = self._refer("[[carries]]", carried.register, COPIED, bank)
        self._small("[[carries]]", "register", register)

    def _check_kick(self, kick: Kick) -> None:
        where = "[[kick]]"
        if kick.bank not in self._banks:
            raise ProfileError(f"{where}: there is no bank '{kick.bank}'")
        self._indexable(where, self._banks[kick.bank], "doorbell", kick.size)
        offset = self._refer(where, kick.offset, (RegisterClass.CONSTANT,), kick.bank)
        self._small(where, "offset", offset)
        for name, _ in kick.when:
            self._small(where, "when", self._refer(where, name, KNOWN, kick.bank))

    def _check_ring(self, ring: Ring) -> None:
        where = "[[ring]]"
        if ring.bank not in self._banks:
            raise ProfileError(f"{where}: there is no bank '{ring.bank}'")
        for name in (ring.size, ring.available, ring.used):
            self._refer(where, name, COPIED, ring.bank)
        for name, _ in ring.when:
            self._small(where, "when", self._refer(where, name, KNOWN, ring.bank))

    def _check_comeback(self) -> None:
        comeback = self._profile.comeback
        if comeback is None:
            return
        where = "[comeback]"
        if not self._profile.rings and not comeback.left_off:
            raise ProfileError(
                f"{where}: what is under way has to be known, by a [[ring]], or the device is left "
                "off for its driver to reset it ('left_off')"
            )
        for name in comeback.same:
            register = self._registers.get(name)
            if register is None or not register.compare or register.bank is not None:
                raise ProfileError(f"{where}: '{name}' in 'same' is no register that is compared")
        for name in comeback.left_off:
            if not self._refer(where, name, COPIED).hold_bits:
                raise ProfileError(f"{where}: '{name}' in 'left_off' has no 'hold_bits'")
        for name, _ in comeback.owed:
            self._small(where, "owed", self._refer(where, name, (RegisterClass.READ_TO_CLEAR,)))
        for name, _ in comeback.error:
            self._small(where, "error", self._refer(where, name, KNOWN))


def _by_name(what: str, parts: Iterable[_Named]) -> dict[str, _Named]:
    named: dict[str, _Named] = {}
    for part in parts:
        if part.name in named:
            raise ProfileError(f"[[{what}]] {part.name}: the name is used twice")
        named[part.name] = part
    return named
