"""What `send` and `receive` say to each other on the ordered control lane: a kind and a payload.

`transport` carries both without looking at them. Everything of the handover is a small JSON
object; register state is a device number followed by the bytes that `sync.registers` made.
The peer is not trusted: every payload is bounded by the transport, what is read out of it is
checked here, and which message may come when stands in `ferry.migration.conversation`.

    send                                receive
    greeting              ->            `MigrationHello`
                          <-            answer: accepted (PREPARED) or refused with a reason
    PROBE                 ->            only after a greeting that asks for a check: nothing is
                                        done with it but to acknowledge it
    STATE n               ->            register state, journal; in the order of capture
    PLATFORM              ->            what the VMM itself knows of the devices; QEMU only
    ASK_LOADED            ->            may the VMM's memory be compared now?
                          <-            LOADED
    ASK                   ->            can you take over? With the guest's run state, which stays
                          <-            READY, with what the register check found
    COMMIT                ->            the point of no return
                          <-            COMMITTED, with what it took; or START_FAILED
                          <-            WATCHED, after COMMITTED: whether the devices work there
    ABORT                 <->           at any time before COMMIT, with a reason
"""

import json
import math
import struct
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

from ferry.errors import PeerProtocolError
from sync.vmm.states import RUNNING, STOPPED

PROTOCOL_VERSION = 5
MAX_DEVICES = 64
"""Devices of one VM. A PCI root bus has 32 slots; the bound only keeps a hostile greeting small."""
MAX_TOKEN_CHARACTERS = 64
MAX_REGIONS = 65536
"""Regions of guest memory, as many as vfio-user's default of max_dma_maps."""

T = TypeVar("T")
MAX_DIGITS = 21
"""Of a whole number of 64 bits, with its sign."""
PROBES = 5
"""So many of them a check sends at most: the shortest round trip is what counts."""

_DEVICE = struct.Struct("<H")


class MessageKind(IntEnum):
    """The number that each message has on the wire; what it says stands in the module's text."""

    STATE = 1
    ASK_LOADED = 2
    LOADED = 3
    ASK = 4
    READY = 5
    COMMIT = 6
    COMMITTED = 7
    START_FAILED = 8
    ABORT = 9
    PLATFORM = 10
    PROBE = 11
    WATCHED = 12


@dataclass(frozen=True)
class DeviceOffer:
    """One device as the source sees it; the target's has to be the same.

    `regions`: [index, size in bytes], `irqs`: [index, number of vectors], ascending. `registers`:
    what `sync.registers` offers (method, profile), in hexadecimal. `place`: where the VMM has it
    plugged (`sync.vmm.devices`), or empty.
    """

    identity: dict[str, int]
    regions: list[list[int]]
    irqs: list[list[int]]
    registers: str
    place: str = ""


@dataclass(frozen=True)
class MigrationHello:
    """The sender's greeting. `layout` is the guest memory as `memory_layout` has it: [IOVA, length,
    file, offset] in bytes, ascending, `files` has [size, size of its pages] of each file.
    `platform` is what the VMM knows of the devices by itself, in hexadecimal (`sync.vmm.pci`); QEMU
    only. `vmm` is the VMM's name, machine type and version as text. `check`: it ends with the
    answer. `tokens` are the words by which the records of this session prove that it is fenced, and
    that it is committed."""

    session: str
    devices: list[DeviceOffer]
    layout: list[list[int]]
    files: list[list[int]]
    platform: str = ""
    vmm: dict[str, str] = field(default_factory=dict)
    check: bool = False
    tokens: tuple[str, str] = ("", "")
    version: int = PROTOCOL_VERSION

    def pack(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> "MigrationHello":
        """The greeting in `payload`. Raises `PeerProtocolError` where it is not what this version
        sends."""
        data = load_object(payload)
        if data.get("version") != PROTOCOL_VERSION:
            raise PeerProtocolError(
                f"the sender speaks version {data.get('version')!r} of the migration protocol, "
                f"this side {PROTOCOL_VERSION}; install the same version on both hosts"
            )
        session, devices, layout = data.get("session"), data.get("devices"), data.get("layout")
        if not (isinstance(session, str) and len(session) == 32 and session.isalnum()):
            raise PeerProtocolError("the greeting has no session id")
        platform = data.get("platform")
        if not _is_hexadecimal(platform):
            raise PeerProtocolError("the greeting has a malformed state of the VMM's devices")
        check = data.get("check")
        if not isinstance(check, bool):
            raise PeerProtocolError("the greeting does not say whether it is a check")
        if not isinstance(devices, list) or not 1 <= len(devices) <= MAX_DEVICES:
            raise PeerProtocolError(f"the greeting has to name 1 to {MAX_DEVICES} devices")
        return cls(
            session=session,
            devices=[_device(item) for item in devices],
            layout=_numbers(layout, 4, MAX_REGIONS, "layout"),
            files=_numbers(data.get("files"), 2, MAX_REGIONS, "files"),
            platform=str(platform),
            vmm=_dict_of(str, data.get("vmm"), "VMM"),
            check=check,
            tokens=_tokens(data.get("tokens")),
        )


def _tokens(value: Any) -> tuple[str, str]:
    match value:
        case [str(fenced), str(committed)] if _is_word(fenced) and _is_word(committed):
            return fenced, committed
    raise PeerProtocolError("the greeting has no tokens")


def _is_word(text: str) -> bool:
    return len(text) <= MAX_TOKEN_CHARACTERS and (text.isalnum() or not text) and text.isascii()


def _device(item: Any) -> DeviceOffer:
    if not isinstance(item, dict):
        raise PeerProtocolError("a device of the greeting is not an object")
    registers = item.get("registers")
    if not _is_hexadecimal(registers):
        raise PeerProtocolError("a device of the greeting has no register offer")
    return DeviceOffer(
        identity=_dict_of(int, item.get("identity"), "identity"),
        regions=_numbers(item.get("regions"), 2, 256, "regions"),
        irqs=_numbers(item.get("irqs"), 2, 256, "irqs"),
        registers=str(registers),
        place=_printable(item.get("place", "")),
    )


def asks_for_check(greeting: bytes) -> bool:
    """Whether a sender's greeting asks for a check only, however broken the rest of it is."""
    try:
        return load_object(greeting).get("check") is True
    except PeerProtocolError:
        return False


def _dict_of(kind: type[T], value: Any, what: str) -> dict[str, T]:
    if not isinstance(value, dict) or not all(isinstance(v, kind) for v in value.values()):
        raise PeerProtocolError(f"the greeting has no sound {what}")
    return value


def _is_hexadecimal(text: Any) -> bool:
    try:
        bytes.fromhex(text if isinstance(text, str) else "?")
    except ValueError:
        return False
    return True


def _numbers(rows: Any, width: int, most: int, what: str) -> list[list[int]]:
    if not isinstance(rows, list) or len(rows) > most:
        raise PeerProtocolError(f"{what} of the greeting is no list of at most {most} rows")
    for row in rows:
        if (
            not isinstance(row, list)
            or len(row) != width
            or not all(type(n) is int and 0 <= n < 1 << 64 for n in row)
        ):
            raise PeerProtocolError(f"a row in {what} of the greeting is malformed")
    return rows


@dataclass(frozen=True)
class Notice:
    """A message's payload that is a JSON object: what it reports, by name."""

    values: dict[str, Any] = field(default_factory=dict)

    def pack(self) -> bytes:
        return json.dumps(self.values, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> "Notice":
        return cls(load_object(payload))

    def text(self, key: str) -> str:
        """The text under `key`, printable and at most 1000 characters: the peer wrote it."""
        return _printable(self.values.get(key, ""))

    def guest_state(self) -> str:
        """The run state of the guest that an ASK tells. Raises `PeerProtocolError`."""
        state = self.values.get("guest")
        if not isinstance(state, str) or state not in (*RUNNING, *STOPPED):
            raise PeerProtocolError("the source does not say in which state its guest was")
        return state

    def mapping(self, key: str) -> dict[str, object]:
        """The object under `key`, empty where there is none. Its values are not checked."""
        return _mapping(self.values.get(key))

    def register_reports(self, n_devices: int) -> list[dict[str, Any]]:
        """What the target tells of each device's registers, with the fields of `RegisterReport`:
        what is not of their kind is left out, for the peer wrote it and people read it."""
        told = self.values.get("registers")
        reports = told[:n_devices] if isinstance(told, list) else []
        return [_register_report(_mapping(report)) for report in reports]


def _printable(value: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(value)[:1000])


def _mapping(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        return {}
    return {_printable(key): item for key, item in value.items()}


def _register_report(told: dict[str, object]) -> dict[str, Any]:
    report: dict[str, Any] = {
        name: value for name, value in told.items() if isinstance(value, int | str)
    }
    divergences = _mapping(told.get("divergences"))
    return report | {
        "method": _printable(told.get("method", "")),
        "divergences": {k: v for k, v in divergences.items() if isinstance(v, int)},
    }


def _integer(text: str) -> int:
    """A number of at most 64 bits: what is larger would overflow where it is computed with."""
    if len(text) > MAX_DIGITS or abs(int(text)) >= 1 << 64:
        raise ValueError("a number of more than 64 bits")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError("a number that is not finite")
    return float(text)


def load_object(payload: bytes) -> dict[str, Any]:
    """The JSON object in `payload`. Raises `PeerProtocolError` where there is none."""
    try:
        data = json.loads(
            payload or b"{}", parse_int=_integer, parse_float=_float, parse_constant=_float
        )
    except (ValueError, RecursionError) as error:
        raise PeerProtocolError("the peer sent a control record that is not JSON") from error
    if not isinstance(data, dict):
        raise PeerProtocolError("the peer sent a control record that is no object")
    return data


def pack_state(device: int, payload: bytes) -> bytes:
    """The payload of a STATE message: register state of the device of this number."""
    return _DEVICE.pack(device) + payload


def unpack_state(record: bytes, n_devices: int) -> tuple[int, bytes]:
    """(device number, register state) of a STATE message. Raises `PeerProtocolError`."""
    if len(record) < _DEVICE.size:
        raise PeerProtocolError("a state record is too short")
    (device,) = _DEVICE.unpack_from(record)
    if device >= n_devices:
        raise PeerProtocolError(f"a state record names device {device} of {n_devices}")
    return device, record[_DEVICE.size :]
