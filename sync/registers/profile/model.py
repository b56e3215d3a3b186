"""A register profile: what is known about the registers of a class of devices.

Owns the model and its rules, and how the two sides tell that they use the same one. Reading TOML
is `toml`, where the format is described; fitting a profile to a device is `layout`.

What a register's class means:

    class               at prepare           a guest's write         a guest's read
    snapshot            copied               replayed at once        not replayed
    replay              -                    replayed at once        not replayed
    hold                -                    last one kept back      not replayed
    read-to-clear       never read           replayed at once        replayed at once
    write-one-to-clear  -                    replayed at once        not replayed
    constant            must be equal        not replayed            not replayed
    ignore              -                    not replayed            not replayed
    refuse              -                    ends the migration      not replayed

`hold` is for doorbells: a write that starts DMA or has an outside effect is executed when the
target owns the guest (I4). Where only some bits of a register do that (the bus master enable, a
driver's "go"), `hold_bits` names them: the rest is written at once, and the whole value when the
target owns the guest, as the source's register holds it at the end. `refuse` is for what cannot
be replayed with any certainty; the guest goes on where it is.

A read-to-clear register may hold what the guest has not read yet when it is stopped, such as the
cause of an interrupt or a statistic. Where `owed` says so it is read at the end, when the device is
at rest, and the guest's next read returns it, too, wherever it goes on.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import StrEnum

from sync.registers.profile.locate import DeviceView

FORMAT = 1
MAX_REGISTERS = 4096
MAX_REGISTER_BYTES = 1 << 24
MAX_COPIED_BYTES = 1 << 14
"""Bound on a block that is read access by access while the guest waits."""
MAX_BANK = 4096


class RegisterClass(StrEnum):
    SNAPSHOT = "snapshot"
    REPLAY = "replay"
    HOLD = "hold"
    READ_TO_CLEAR = "read-to-clear"
    WRITE_ONE_TO_CLEAR = "write-one-to-clear"
    CONSTANT = "constant"
    IGNORE = "ignore"
    REFUSE = "refuse"


class Unlisted(StrEnum):
    """What to do with a guest's write to a register that the profile does not list."""

    REPLAY = "replay"
    IGNORE = "ignore"
    REFUSE = "refuse"
    """Give the migration up: what the write meant is not known."""


class Deferral(StrEnum):
    """How the guest gets, with its next read, what was in a register at the end."""

    BITS = "bits"
    """The bits are set, too."""
    COUNT = "count"
    """Each access of the register is a counter, to which it is added."""


@dataclass(frozen=True, slots=True)
class Match:
    """Which devices a profile is for. `None` matches anything; ranges are inclusive."""

    vendor: int
    device: tuple[int, int] | None = None
    subsystem_vendor: int | None = None
    subsystem: tuple[int, int] | None = None
    class_code: tuple[int, int] | None = None

    def fits(self, view: DeviceView) -> bool:
        return (
            view.vendor == self.vendor
            and _within(view.device, self.device)
            and self.subsystem_vendor in (None, view.subsystem_vendor)
            and _within(view.subsystem, self.subsystem)
            and _within(view.class_code, self.class_code)
        )

    @property
    def precision(self) -> int:
        """How narrow it is: narrower matches win."""
        score = sum(
            part is not None
            for part in (self.device, self.subsystem_vendor, self.subsystem, self.class_code)
        )
        single = self.device is not None and self.device[0] == self.device[1]
        return 2 * score + single


def _within(value: int, bounds: tuple[int, int] | None) -> bool:
    return bounds is None or bounds[0] <= value <= bounds[1]


@dataclass(frozen=True, slots=True)
class Register:
    """A register, or a block of them that are treated alike. Sizes and offsets in bytes."""

    name: str
    base: str
    offset: int
    size: int | None
    """None: up to the end of the base."""
    kind: RegisterClass
    access: int = 4
    """Width of the accesses that we make: 1, 2, 4 or 8; `size` is a multiple of it."""
    max_size: int = MAX_REGISTER_BYTES
    """Bound on a `size` that follows the base."""
    bank: str | None = None
    hold_bits: int = 0
    skip: int | None = None
    """A value that need not, or must not, be written at restore: it is the one after reset."""
    compare: bool = False
    """Must be equal on both sides at the end; bits that are held back are left out."""
    driver_only: bool = False
    """`snapshot` only: nobody but the driver changes it, so its captured writes say what is in it,
    and it is not read again at the end, while the guest waits."""
    reads: bool = False
    """A guest's read is executed on the target, too, and its value compared."""
    owed: Deferral | None = None
    """`read-to-clear` only: what is in it at the end is given to the guest with its next read."""
    optional: bool = False
    """A device without the base, or with a shorter one, simply does not have the register."""


@dataclass(frozen=True, slots=True)
class Bank:
    """Registers that exist `count` times behind one address, chosen by a selector register."""

    name: str
    selector: str
    count: int | str
    """A number, or the `constant` register that holds it."""
    limit: int = MAX_BANK
    """More than this is refused: reading them all would hold the guest up for too long."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of restoring a device. Exactly one of `write`, `bank` and `rest` is set."""

    write: str | None = None
    """A register; it gets `value`, or the source's value with `mask` applied."""
    value: int | None = None
    mask: int | None = None
    when: tuple[tuple[str, int], ...] = ()
    """Registers and the bits that must all be set in the source's value, or the step is left out.
    In the profile's file: `when = { device_status = 0x08 }`."""
    bank: str | None = None
    """All copied registers of a bank, for each index in turn, in the order of the profile."""
    rest: bool = False
    """All copied registers outside banks that no step before or behind this one writes."""


@dataclass(frozen=True, slots=True)
class Reset:
    """A write that resets the device as a whole: what was held back before it is void."""

    register: str
    value: int


@dataclass(frozen=True, slots=True)
class Kick:
    """Doorbells to ring when a device starts anew, so that nothing that was queued is forgotten.

    For each index of `bank` whose registers hold the values in `when`, the index is written with
    `size` bytes to `base`, at `offset` (a constant register of the bank) times the multiplier
    that the base comes with.
    """

    bank: str
    base: str
    offset: str
    size: int
    when: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Carried:
    """Which features a driver may have negotiated for its device to be moved by this profile.

    A profile knows what its author knew: any other bit may mean state, or an order of things, of
    which it says nothing. Bit n of index i of a register of w bits in a bank is number w * i + n.
    """

    register: str
    """A snapshot register, in a bank or outside, that holds the bits in force."""
    bits: tuple[int, ...]
    names: tuple[tuple[str, int], ...] = ()
    """What to call bits that are not carried. In the profile's file: `names = { packed = 34 }`."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Split virtqueues in guest memory (virtio 1.2, section 2.7), which tell what is under way.

    There is one for each index of `bank` whose registers hold the values in `when`. The others name
    registers of the bank: the number of descriptors, and the addresses of the rings.
    """

    bank: str
    size: str
    available: str
    used: str
    when: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Comeback:
    """How a device goes on in another process when its own has died.

    Without `left_off` what is under way has to be known: by `Profile.rings`.
    """

    same: tuple[str, ...] = ()
    """Registers that have to read as they did, beside the constants: it is another device else."""
    left_off: tuple[str, ...] = ()
    """Registers whose held back bits are not written: the device does not start, its driver finds
    that nothing happens, and resets it. For a device of which nobody knows what was under way."""
    owed: tuple[tuple[str, int], ...] = ()
    """Registers that a read clears, and bits that the guest gets with its next read of them, for it
    may not have read them. In the profile's file: `owed = { isr_status = 0x01 }`."""
    error: tuple[tuple[str, int], ...] = ()
    """Registers and bits by which a device tells its driver that it has to be reset: the driver
    reads them next if what was under way is not known."""


@dataclass(frozen=True, slots=True)
class Profile:
    """See `rules` for the rules that one keeps."""

    name: str
    version: str
    matches: tuple[Match, ...]
    registers: tuple[Register, ...]
    banks: tuple[Bank, ...] = ()
    steps: tuple[Step, ...] = ()
    kicks: tuple[Kick, ...] = ()
    reset: Reset | None = None
    carried: tuple[Carried, ...] = ()
    rings: tuple[Ring, ...] = ()
    comeback: Comeback | None = None
    """None: a device that has lost its process is gone for good."""
    unlisted: Unlisted = Unlisted.REPLAY

    def digest(self) -> str:
        """SHA-256 in hex over everything that the profile says; equal on both sides, or no go."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def precision(self, view: DeviceView) -> int | None:
        """How well the profile fits the device: higher is better, None is not at all."""
        return max((match.precision for match in self.matches if match.fits(view)), default=None)
