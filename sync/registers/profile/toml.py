"""Register profiles as TOML: the format, and its strict reading.

Owns the text form. What classes and steps mean stands in `model`, what has to hold between the
parts in `rules`, what a base is in `locate`.

    format = 1                       # this format
    name = "virtio-pci"              # lower case letters, digits, '.', '_', '-'
    version = "1"                    # changes with each change of the file
    # draft = true                   # refused: what a refusal prints to start from has it
    unlisted = "replay"              # or "ignore", "refuse": writes to registers not listed here

    [[match]]                        # at least one; every key that is given has to fit
    vendor = 0x1af4
    device = 0x1042                  # a number, or an inclusive range: [0x1040, 0x107f]
    # subsystem_vendor, subsystem (or a range), class (24 bits, or a range)

    [[bank]]                         # registers that exist several times behind a selector
    name = "queues"
    selector = "queue_select"        # a snapshot register
    count = "num_queues"             # a constant register, or a number
    limit = 256                      # refuse a device with more

    [[register]]                     # ranges must not overlap
    name = "device_status"
    base = "virtio:common"
    offset = 20
    size = 1                         # bytes, or "window": all that the base has
    class = "snapshot"               # see `profile`
    hold_bits = 0x04                 # bits that are kept back until the target owns the guest
    # access = 1                     # width of our accesses; else size, or 4 for a block
    # max_size = 64                  # bound on size = "window"
    # bank = "queues"
    # skip = 0                       # value not written at restore
    # compare = true                 # must be equal at the end; snapshot and constant always are
    # compare = false                #   ... unless a snapshot register says that it is volatile
    # driver_only = true             # nobody else changes it: not read again at the end
    # reads = true                   # guest's reads are executed and compared on the target, too
    # owed = "bits"                  # read-to-clear: what is left in it at the end is not lost,
    # owed = "count"                 #   but set, or added, in what the guest reads next
    # optional = true                # not every device of this class has it

    [[restore]]                      # the order in which the target is written; by default the
    write = "device_status"          #   banks, then the rest
    value = 0                        # a number, or the source's value:
    [[restore]]
    write = "device_status"
    mask = 0x03
    [[restore]]
    write = "device_status"
    mask = 0x0b
    when = { device_status = 0x08 }  # only if the source's value has all of these bits
    [[restore]]
    bank = "queues"
    [[restore]]
    rest = true                      # everything else that is copied
                                     # (selectors are always written last)

    [[carries]]                      # what a driver may have negotiated; another bit is refused
    register = "driver_feature"      # a snapshot register; in a bank, bit 32 is the next index's
    bits = [5, 28, 29, 32]
    names = { packed = 34 }          # what to call bits that are not carried

    [reset]                          # the write that resets the device
    register = "device_status"
    value = 0

    [[kick]]                         # doorbells to ring when the device starts anew
    bank = "queues"
    when = { queue_enable = 1 }      # values of the bank's registers
    base = "virtio:notify"
    offset = "queue_notify_off"      # constant register of the bank, times the base's multiplier
    size = 2

    [[ring]]                         # split virtqueues, which tell what is under way
    bank = "queues"
    when = { queue_enable = 1 }
    size = "queue_size"              # registers of the bank: how many descriptors, and where the
    available = "queue_driver"       #   rings are
    used = "queue_device"

    [comeback]                       # its process died, another takes its place
    same = ["device_config"]         # what has to read as before, beside the constants
    owed = { isr_status = 0x01 }     # bits that the guest may not have read yet
    error = { device_status = 0x40 } # how the device says that it needs a reset
    # left_off = ["rctl", "tctl"]    # held back bits that are not written: its driver resets it
"""

import re
import tomllib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from sync.registers.errors import ProfileError
from sync.registers.profile.locate import is_base
from sync.registers.profile.model import (
    FORMAT,
    MAX_BANK,
    MAX_REGISTER_BYTES,
    MAX_REGISTERS,
    Bank,
    Carried,
    Comeback,
    Deferral,
    Kick,
    Match,
    Profile,
    Register,
    RegisterClass,
    Reset,
    Ring,
    Step,
    Unlisted,
)
from sync.registers.profile.rules import KNOWN, check_rules

T = TypeVar("T")

MAX_FILE_BYTES = 256 << 10
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MAX_FEATURE_BITS = 4096
_WIDTHS = (1, 2, 4, 8)
_U64 = (1 << 64) - 1


def parse_profile(text: str) -> Profile:
    """The profile in `text`. Raises `ProfileError`, which names the key and what is allowed."""
    if len(text) > MAX_FILE_BYTES:
        raise ProfileError(f"a profile may have {MAX_FILE_BYTES} characters, not {len(text)}")
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ProfileError(f"not valid TOML: {error}") from error
    top = _Table(document, "the profile")
    version = top.integer("format", 0, _U64)
    if version != FORMAT:
        raise ProfileError(f"'format' is {version}, this program reads {FORMAT}")
    if top.has("draft"):
        raise ProfileError(
            "this is a draft, and a device that is moved by a guess is dead: describe its "
            "registers, then delete the line 'draft'"
        )
    profile = Profile(
        name=top.name("name"),
        version=top.text("version", 32),
        unlisted=Unlisted(top.choice("unlisted", [*Unlisted], Unlisted.REPLAY)),
        matches=top.tables("match", _match, at_least=1),
        banks=top.tables("bank", _bank),
        registers=top.tables("register", _register, at_least=1),
        steps=top.tables("restore", _step),
        kicks=top.tables("kick", _kick),
        carried=top.tables("carries", _carried),
        reset=top.table("reset", _reset),
        rings=top.tables("ring", _ring),
        comeback=top.table("comeback", _comeback),
    )
    top.finish()
    check_rules(profile)
    return profile


class _Table:
    """A TOML table that is read key by key; what nobody asked for is an error."""

    def __init__(self, table: dict[str, Any], where: str) -> None:
        self._table = table
        self._asked: set[str] = set()
        self.where = where

    def _get(self, key: str) -> Any:
        self._asked.add(key)
        return self._table.get(key)

    def _fail(self, key: str, allowed: str) -> ProfileError:
        if key not in self._table:
            return ProfileError(f"{self.where}: '{key}' is missing; it has to be {allowed}")
        return ProfileError(
            f"{self.where}: '{key}' is {self._table[key]!r}; it has to be {allowed}"
        )

    def has(self, key: str) -> bool:
        return key in self._table

    def holds_text(self, key: str) -> bool:
        return type(self._table.get(key)) is str

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self._fail(key, f"a whole number from {low} to {high:#x}")
        return value

    def maybe_integer(self, key: str, high: int) -> int | None:
        return self.integer(key, 0, high) if self._get(key) is not None else None

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._fail(key, "true or false")
        return value

    def text(self, key: str, max_characters: int) -> str:
        value = self._get(key)
        if type(value) is not str or not 0 < len(value) <= max_characters:
            raise self._fail(key, f"a text of 1 to {max_characters} characters")
        return value

    def name(self, key: str) -> str:
        value = self._get(key)
        if type(value) is not str or _NAME.fullmatch(value) is None:
            raise self._fail(key, "1 to 64 lower case letters, digits, '.', '_' and '-'")
        return value

    def maybe_name(self, key: str) -> str | None:
        return self.name(key) if self._get(key) is not None else None

    def base(self, key: str) -> str:
        value = self._get(key)
        if type(value) is not str or not is_base(value):
            raise self._fail(
                key,
                "a base that sync.registers.profile.locate describes: pci:config, pci:cap:0x.., "
                "pci:ecap:0x.., msix:.., virtio:.., or bar0 to bar5",
            )
        return value

    def choice(self, key: str, allowed: Iterable[str], default: str | None = None) -> str:
        value = self._get(key)
        if value is None and default is not None:
            return default
        words = list(allowed)
        if type(value) is not str or value not in words:
            raise self._fail(key, "one of " + ", ".join(words))
        return value

    def interval(self, key: str, high: int) -> tuple[int, int] | None:
        value = self._get(key)
        if value is None:
            return None
        bounds = value if type(value) is list else [value, value]
        if (
            len(bounds) != 2
            or any(type(bound) is not int for bound in bounds)
            or not 0 <= bounds[0] <= bounds[1] <= high
        ):
            raise self._fail(key, f"a number, or [first, last], from 0 to {high:#x}")
        return bounds[0], bounds[1]

    def bits(self, key: str) -> tuple[int, ...]:
        value = self._get(key)
        if type(value) is not list or any(
            type(bit) is not int or not 0 <= bit < MAX_FEATURE_BITS for bit in value
        ):
            raise self._fail(key, f"a list of bit numbers below {MAX_FEATURE_BITS}")
        return tuple(sorted(set(value)))

    def names(self, key: str) -> tuple[str, ...]:
        value = self._get(key)
        if value is None:
            return ()
        if type(value) is not list or any(type(name) is not str for name in value):
            raise self._fail(key, "a list of register names")
        return tuple(value)

    def conditions(self, key: str) -> tuple[tuple[str, int], ...]:
        value = self._get(key)
        if value is None:
            return ()
        if type(value) is not dict or any(
            type(number) is not int or not 0 <= number <= _U64 for number in value.values()
        ):
            raise self._fail(key, "a table of register names and numbers")
        return tuple(value.items())

    def tables(self, key: str, make: Callable[["_Table"], T], at_least: int = 0) -> tuple[T, ...]:
        value = self._get(key)
        if value is None and not at_least:
            return ()
        if (
            type(value) is not list
            or not at_least <= len(value) <= MAX_REGISTERS
            or any(type(each) is not dict for each in value)
        ):
            raise self._fail(key, f"{at_least} to {MAX_REGISTERS} tables: [[{key}]]")
        return tuple(
            _Table(each, f"[[{key}]] {each.get('name', f'number {place}')}").read(make)
            for place, each in enumerate(value, 1)
        )

    def table(self, key: str, make: Callable[["_Table"], T]) -> T | None:
        value = self._get(key)
        if value is None:
            return None
        if type(value) is not dict:
            raise self._fail(key, f"a table: [{key}]")
        return _Table(value, f"[{key}]").read(make)

    def read(self, make: Callable[["_Table"], T]) -> T:
        """What `make` makes of the table, which asks for all that is in it."""
        made = make(self)
        self.finish()
        return made

    def finish(self) -> None:
        """Raises `ProfileError` if there are keys that nobody asked for."""
        unknown = sorted(set(self._table) - self._asked)
        if unknown:
            raise ProfileError(
                f"{self.where}: unknown key '{unknown[0]}'; "
                f"allowed are {', '.join(sorted(self._asked))}"
            )


def _match(table: _Table) -> Match:
    return Match(
        vendor=table.integer("vendor", 0, 0xFFFF),
        device=table.interval("device", 0xFFFF),
        subsystem_vendor=table.maybe_integer("subsystem_vendor", 0xFFFF),
        subsystem=table.interval("subsystem", 0xFFFF),
        class_code=table.interval("class", 0xFFFFFF),
    )


def _bank(table: _Table) -> Bank:
    count: int | str
    if table.holds_text("count"):
        count = table.name("count")
    else:
        count = table.integer("count", 1, MAX_BANK)
    return Bank(
        name=table.name("name"),
        selector=table.name("selector"),
        count=count,
        limit=table.integer("limit", 1, MAX_BANK, MAX_BANK),
    )


def _register(table: _Table) -> Register:
    name = table.name("name")
    size: int | None = None
    if table.holds_text("size"):
        table.choice("size", ["window"])
    else:
        size = table.integer("size", 1, MAX_REGISTER_BYTES)
    kind = RegisterClass(table.choice("class", [*RegisterClass]))
    width = table.integer("access", 1, 8, size if size in _WIDTHS else 4)
    max_size = table.integer("max_size", 1, MAX_REGISTER_BYTES, MAX_REGISTER_BYTES)
    if width not in _WIDTHS:
        raise ProfileError(f"{table.where}: 'access' is {width}; it has to be 1, 2, 4 or 8")
    for key, amount in (("size", size), ("max_size", max_size)):
        if amount is not None and amount % width:
            raise ProfileError(f"{table.where}: '{key}' has to be a multiple of 'access', {width}")
    if size is not None and table.has("max_size"):
        raise ProfileError(f"{table.where}: 'max_size' goes with size = \"window\" only")
    return Register(
        name=name,
        base=table.base("base"),
        offset=table.integer("offset", 0, (1 << 32) - 1, 0),
        size=size,
        kind=kind,
        access=width,
        max_size=max_size,
        bank=table.maybe_name("bank"),
        hold_bits=table.integer("hold_bits", 0, _U64, 0),
        skip=table.maybe_integer("skip", _U64),
        compare=table.boolean("compare", kind in KNOWN),
        driver_only=table.boolean("driver_only", False),
        reads=table.boolean("reads", kind is RegisterClass.READ_TO_CLEAR),
        owed=Deferral(table.choice("owed", [*Deferral])) if table.has("owed") else None,
        optional=table.boolean("optional", False),
    )


def _step(table: _Table) -> Step:
    step = Step(
        write=table.maybe_name("write"),
        value=table.maybe_integer("value", _U64),
        mask=table.maybe_integer("mask", _U64),
        when=table.conditions("when"),
        bank=table.maybe_name("bank"),
        rest=table.boolean("rest", False),
    )
    if sum((step.write is not None, step.bank is not None, step.rest)) != 1:
        raise ProfileError(f"{table.where}: exactly one of 'write', 'bank' and 'rest' is needed")
    if step.write is None and (step.value is not None or step.mask is not None):
        raise ProfileError(f"{table.where}: 'value' and 'mask' go with 'write' only")
    if step.value is not None and step.mask is not None:
        raise ProfileError(f"{table.where}: 'value' and 'mask' exclude each other")
    return step


def _carried(table: _Table) -> Carried:
    return Carried(table.name("register"), table.bits("bits"), table.conditions("names"))


def _kick(table: _Table) -> Kick:
    kick = Kick(
        bank=table.name("bank"),
        base=table.base("base"),
        offset=table.name("offset"),
        size=table.integer("size", 1, 8),
        when=table.conditions("when"),
    )
    if kick.size not in _WIDTHS:
        raise ProfileError(f"{table.where}: 'size' is {kick.size}; it has to be 1, 2, 4 or 8")
    return kick


def _reset(table: _Table) -> Reset:
    return Reset(table.name("register"), table.integer("value", 0, _U64))


def _ring(table: _Table) -> Ring:
    return Ring(
        bank=table.name("bank"),
        size=table.name("size"),
        available=table.name("available"),
        used=table.name("used"),
        when=table.conditions("when"),
    )


def _comeback(table: _Table) -> Comeback:
    return Comeback(
        table.names("same"),
        table.names("left_off"),
        table.conditions("owed"),
        table.conditions("error"),
    )
