"""The example of a profile that comes as a package: found as the product finds it, and it moves the
device that it describes.

The package is not installed but lies on the path with the metadata that an installation would make
of its pyproject.toml, so that no package index is needed.
"""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from sync.registers.errors import RefusedAccess
from sync.registers.find import ENTRY_POINT_GROUP, find_profile, load_profiles
from sync.registers.profile.locate import DeviceView
from sync.registers.profile.toml import parse_profile
from sync.registers.record import Access, Op
from tests.sync.registers.conftest import FakeGateway, Guest
from tests.sync.registers.pair import Pair

PLUGIN = Path(__file__).parents[2] / "examples" / "profile_plugin"
BAR, CONFIG = 0, 7
CONTROL, HEAD, TAIL, INTERRUPT, CAUSE, COPIED, RESET, FIRMWARE = (
    *(0x04, 0x14, 0x18, 0x1C, 0x20, 0x24),
    *(0x28, 0x30),
)
RUN, INTERRUPTS = 1, 2


def view() -> DeviceView:
    return DeviceView(
        vendor=0xFFFE,
        device=1,
        subsystem_vendor=0,
        subsystem=0,
        class_code=0x088000,
        config_space=bytes(256),
        region_sizes={BAR: 0x100, CONFIG: 256},
    )


class RingCopier:
    """The engine, as its profile describes it; copies and interrupts are `effects`."""

    def __init__(self) -> None:
        self.effects: list[str] = []
        self.config = bytearray(256)
        self.bar = bytearray(0x100)
        self.reset()

    def reset(self) -> None:
        self.bar[:] = bytes(0x100)
        self.put(0x00, 0x00020001)

    def get(self, offset: int) -> int:
        return int.from_bytes(self.bar[offset : offset + 4], "little")

    def put(self, offset: int, value: int) -> None:
        self.bar[offset : offset + 4] = value.to_bytes(4, "little")

    def read(self, region: int, offset: int, size: int) -> bytes:
        space = self.config if region == CONFIG else self.bar
        data = bytes(space[offset : offset + size])
        if region == BAR and offset in (CAUSE, COPIED):
            self.put(offset, 0)
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        if region == CONFIG:
            self.config[offset : offset + len(data)] = data
            return
        if offset == RESET:
            self.reset()
        elif offset == INTERRUPT:
            self.effects.append("interrupt")
        else:
            self.bar[offset : offset + len(data)] = data
            self.copy()

    def copy(self) -> None:
        """Does what is between head and tail, 512 bytes for each descriptor."""
        if self.get(CONTROL) & RUN and self.get(HEAD) != self.get(TAIL):
            self.effects.append(f"copies from {self.get(HEAD)} to {self.get(TAIL)}")
            self.put(COPIED, self.get(COPIED) + 512 * (self.get(TAIL) - self.get(HEAD)))
            self.put(HEAD, self.get(TAIL))
            self.put(CAUSE, 1)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(PLUGIN))


@pytest.fixture
def pair() -> Pair:
    text = (PLUGIN / "ring_copier_profile" / "ring_copier.toml").read_text()
    model = SimpleNamespace(
        PROFILE=text,
        profile=parse_profile,
        view=view,
        Device=RingCopier,
        Gateway=FakeGateway,
        Guest=Guest,
    )
    made = Pair(model)
    made.guest.do(write(0x08, bytes(12)))
    made.guest.do(write(0x10, word(256)))
    made.guest.do(write(CONTROL, word(RUN | INTERRUPTS)))
    made.guest.do(write(TAIL, word(3)))
    return made


def word(value: int) -> bytes:
    return value.to_bytes(4, "little")


def write(offset: int, data: bytes) -> Access:
    return Access(Op.WRITE, BAR, offset, len(data), data)


@pytest.mark.usefixtures("installed")
def test_the_product_finds_the_profile_by_its_entry_point() -> None:
    assert [point.name for point in entry_points(group=ENTRY_POINT_GROUP)] == ["ring-copier"]
    profile = find_profile(view(), load_profiles())
    assert profile is not None
    assert profile.name == "ring-copier"


def test_the_device_goes_on_where_it_was_and_starts_nothing_before(pair: Pair) -> None:
    async def move() -> None:
        await pair.begin()
        pair.guest.do(write(TAIL, word(7)))
        pair.guest.do(write(INTERRUPT, word(1)))
        await pair.deliver(pair.source.precopy())
        await pair.switch()
        await pair.target.finish()
        assert pair.target_device.effects == []
        assert pair.target_device.get(TAIL) == 0
        started: Any = pair.target.start_records()
        await pair.target_gateway.batch(started)

    trio.run(move)
    target = pair.target_device
    assert pair.source_device.effects == ["copies from 0 to 3", "copies from 3 to 7", "interrupt"]
    assert target.effects == ["interrupt"]
    assert (target.get(HEAD), target.get(TAIL), target.get(CONTROL)) == (7, 7, RUN | INTERRUPTS)
    target.write(BAR, TAIL, word(9))
    assert target.effects[-1] == "copies from 7 to 9"


def test_a_command_to_the_firmware_ends_the_migration(pair: Pair) -> None:
    async def move() -> None:
        await pair.begin()
        pair.guest.do(write(FIRMWARE, word(1)))
        with pytest.raises(RefusedAccess, match="firmware_command"):
            await pair.deliver(pair.source.precopy())

    trio.run(move)
