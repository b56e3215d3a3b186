"""A device as a plain dictionary of registers, and a gateway that executes batches on it.

Independent of the code under test, but for the record format that both sides speak.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from sync.registers.profile.locate import DeviceView
from sync.registers.profile.model import Profile
from sync.registers.profile.toml import parse_profile
from sync.registers.record import Access, Op, pack_access, pack_accesses, unpack_accesses

BAR, CONFIG = 0, 7
BAR_BYTES = 0x100
N_QUEUES = 3
BROKEN_FROM = 0xF0
"""The device answers accesses from here on with an error."""

PROFILE = """
format = 1
name = "model"
version = "1"

[[match]]
vendor = 0x1234
device = 0x5678

[[bank]]
name = "queues"
selector = "select"
count = "n_queues"

[[register]]
name = "command"
base = "pci:config"
offset = 0x04
size = 2
class = "snapshot"
hold_bits = 0x0004

[[register]]
name = "control"
base = "bar0"
offset = 0x00
size = 4
class = "snapshot"
hold_bits = 0x00010001
reads = true

[[register]]
name = "select"
base = "bar0"
offset = 0x04
size = 2
class = "snapshot"

[[register]]
name = "n_queues"
base = "bar0"
offset = 0x06
size = 2
class = "constant"

[[register]]
name = "ring"
base = "bar0"
offset = 0x08
size = 4
class = "snapshot"
bank = "queues"

[[register]]
name = "enable"
base = "bar0"
offset = 0x0c
size = 2
class = "snapshot"
bank = "queues"
skip = 0

[[register]]
name = "notify_off"
base = "bar0"
offset = 0x0e
size = 2
class = "constant"
bank = "queues"

[[register]]
name = "cause"
base = "bar0"
offset = 0x10
size = 4
class = "write-one-to-clear"

[[register]]
name = "events"
base = "bar0"
offset = 0x14
size = 4
class = "read-to-clear"

[[register]]
name = "scratch"
base = "bar0"
offset = 0x18
size = 8
class = "snapshot"

[[register]]
name = "mode"
base = "bar0"
offset = 0x20
size = 4
class = "replay"

[[register]]
name = "reset"
base = "bar0"
offset = 0x24
size = 4
class = "replay"

[[register]]
name = "counter"
base = "bar0"
offset = 0x28
size = 4
class = "ignore"

[[register]]
name = "block"
base = "bar0"
offset = 0x30
size = 16
class = "snapshot"

[[register]]
name = "doorbells"
base = "bar0"
offset = 0x40
size = 16
class = "hold"

[[restore]]
write = "reset"
value = 1
[[restore]]
bank = "queues"
[[restore]]
rest = true

[reset]
register = "reset"
value = 1

[[kick]]
bank = "queues"
when = { enable = 1 }
base = "virtio:notify"
offset = "notify_off"
size = 2
"""

REGISTERS = {
    "control": (BAR, 0x00, 4),
    "select": (BAR, 0x04, 2),
    "n_queues": (BAR, 0x06, 2),
    "ring": (BAR, 0x08, 4),
    "enable": (BAR, 0x0C, 2),
    "notify_off": (BAR, 0x0E, 2),
    "cause": (BAR, 0x10, 4),
    "events": (BAR, 0x14, 4),
    "scratch": (BAR, 0x18, 8),
    "mode": (BAR, 0x20, 4),
    "reset": (BAR, 0x24, 4),
    "counter": (BAR, 0x28, 4),
    "block": (BAR, 0x30, 16),
    "doorbells": (BAR, 0x40, 16),
    "command": (CONFIG, 0x04, 2),
}
BANKED = ("ring", "enable")
READ_ONLY = ("n_queues", "notify_off")


class DeviceError(Exception):
    """The device answers an access with an error."""


class ModelDevice:
    """Registers by name, queues by index; `effects` is what the device did to the outside."""

    def __init__(self) -> None:
        self.effects: list[tuple[str, int]] = []
        self.values: dict[str, int] = {}
        self.reset()
        self.values["cause"] = self.values["events"] = self.values["command"] = 0

    def reset(self) -> None:
        kept = {name: self.values.get(name, 0) for name in ("cause", "events", "command")}
        self.values = {
            name: 0 for name in REGISTERS if name not in (*BANKED, *READ_ONLY, "doorbells")
        }
        self.values |= kept
        self.queues = [{"ring": 0, "enable": 0} for _ in range(N_QUEUES)]

    def state(self) -> dict[str, Any]:
        """Everything that can be observed, without observing it."""
        return {"values": dict(self.values), "queues": [dict(queue) for queue in self.queues]}

    def get(self, name: str) -> int:
        selected = self.values["select"]
        if name == "n_queues":
            return N_QUEUES
        if name == "notify_off":
            return 0x10 + selected
        if name == "doorbells":
            return 0
        if name in BANKED:
            return self.queues[selected][name] if selected < N_QUEUES else 0
        return self.values[name]

    def set(self, name: str, value: int) -> None:
        selected = self.values["select"]
        if name in READ_ONLY or name == "counter":
            return
        if name == "cause":
            self.values["cause"] &= ~value
        elif name == "events":
            pass
        elif name == "reset":
            if value == 1:
                self.reset()
        elif name in BANKED:
            if selected < N_QUEUES:
                self.queues[selected][name] = value
        else:
            if name == "control" and value & 0x00010001:
                self.effects.append(("control", value))
            if name == "command" and value & 4:
                self.effects.append(("command", value))
            self.values[name] = value

    def read(self, region: int, offset: int, size: int) -> bytes:
        data = bytearray(size)
        if region == BAR and offset + size > BROKEN_FROM:
            raise DeviceError
        for name, low, high, at, width in self._touched(region, offset, size):
            value = self.get(name).to_bytes(width, "little")
            data[low - offset : high - offset] = value[low - at : high - at]
            if name == "events":
                self.values["events"] = 0
        return bytes(data)

    def write(self, region: int, offset: int, data: bytes) -> None:
        if region == BAR and offset + len(data) > BROKEN_FROM:
            raise DeviceError
        for name, low, high, at, width in self._touched(region, offset, len(data)):
            if name == "doorbells":
                self.effects.append((f"doorbell {offset:#x}", int.from_bytes(data, "little")))
                continue
            base = 0 if name in ("cause", "reset") else self.get(name)
            value = bytearray(base.to_bytes(width, "little"))
            value[low - at : high - at] = data[low - offset : high - offset]
            self.set(name, int.from_bytes(value, "little"))

    @staticmethod
    def _touched(region: int, offset: int, size: int) -> Iterator[tuple[str, int, int, int, int]]:
        for name, (where, at, width) in REGISTERS.items():
            low, high = max(offset, at), min(offset + size, at + width)
            if where == region and low < high:
                yield name, low, high, at, width


@dataclass
class FakeGateway:
    """Executes batches on a device. `overrides` stand for a gateway that is not as it should be."""

    device: ModelDevice
    executed: list[Access] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    pending: bytes = b""
    overflow: bool = False
    next_seq: Callable[[], int] = lambda: 0
    writes_back: bool = True
    before_batch: Callable[[], None] = lambda: None

    async def batch(self, records: bytes) -> bytes:
        self.before_batch()
        first_reads: dict[tuple[int, int, int], bytes] = {}
        out = bytearray()
        accesses = list(unpack_accesses(records))
        self.batches.append(len(accesses))
        for access in accesses:
            done = self.execute(access, first_reads)
            self.executed.append(done)
            out += pack_access(done, len(out) // 32)
        return bytes(out)

    def execute(self, access: Access, first_reads: dict[tuple[int, int, int], bytes]) -> Access:
        key = access[1:4]
        try:
            if access.op is Op.RESET:
                self.device.reset()
            elif access.op is Op.READ:
                access = access._replace(data=self.device.read(*key))
                first_reads.setdefault(key, access.data)
            else:
                data = access.data
                if access.write_back and self.writes_back:
                    data = first_reads.get(key, data)
                self.device.write(access.region, access.offset, data)
        except DeviceError:
            return access._replace(failed=True, data=access.data or bytes(access.size))
        return access

    async def journal(self, max_records: int = 65536) -> tuple[bytes, bool]:
        taken, self.pending = self.pending[: 32 * max_records], self.pending[32 * max_records :]
        return taken, self.overflow

    def overflows(self) -> None:
        """The journal is full: what is in it is useless, and what follows is lost."""
        self.pending, self.overflow = self.pending[:32], True

    async def recapture(self, snapshot: bytes) -> tuple[bytes, int]:
        values = await self.batch(snapshot)
        self.pending, self.overflow = b"", False
        return values, self.next_seq()

    async def mig_state(self, state: int) -> None:
        raise AssertionError("not with this method")

    async def mig_read(self, max_bytes: int) -> bytes:
        raise AssertionError("not with this method")

    async def mig_write(self, data: bytes) -> None:
        raise AssertionError("not with this method")


class Guest:
    """Uses a device through a gateway, which captures from `seq` on."""

    def __init__(self, gateway: FakeGateway, seq: int | None = None) -> None:
        self.gateway = gateway
        self.seq = seq
        gateway.next_seq = lambda: self.seq or 0

    def do(self, access: Access) -> Access:
        done = self.gateway.execute(access, {})
        if self.seq is not None:
            record = pack_access(done, self.seq)
            self.seq += len(record) // 32
            self.gateway.pending += record
        return done


def configuration() -> bytes:
    """A virtio capability says where the doorbells are: those of queue i at 4 * (0x10 + i)."""
    config = bytearray(256)
    config[0x34] = 0x40
    config[0x40:0x54] = (
        bytes([0x09, 0, 20, 2, BAR, 0, 0, 0])
        + (0x00).to_bytes(4, "little")
        + (0x50).to_bytes(4, "little")
        + (4).to_bytes(4, "little")
    )
    return bytes(config)


def view(**changes: Any) -> DeviceView:
    fields: dict[str, Any] = {
        "vendor": 0x1234,
        "device": 0x5678,
        "subsystem_vendor": 1,
        "subsystem": 2,
        "class_code": 0x010203,
        "config_space": configuration(),
        "region_sizes": {BAR: BAR_BYTES, CONFIG: 256},
    }
    return DeviceView(**{**fields, **changes})


def model_profile(text: str = PROFILE) -> Profile:
    return parse_profile(text)


class Everything(SimpleNamespace):
    def __repr__(self) -> str:
        return "model"


@pytest.fixture(scope="session")
def model() -> SimpleNamespace:
    """Everything above, for test files that cannot import it."""
    return Everything(
        Device=ModelDevice,
        Gateway=FakeGateway,
        Guest=Guest,
        DeviceError=DeviceError,
        view=view,
        profile=model_profile,
        PROFILE=PROFILE,
        REGISTERS=REGISTERS,
        BAR=BAR,
        CONFIG=CONFIG,
        N_QUEUES=N_QUEUES,
        pack=pack_accesses,
    )
