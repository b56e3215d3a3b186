"""What the driver has negotiated is looked at, if nobody else is at the gateway."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from ferry.doctor import gateway
from ferry.doctor.gateway import Wish
from ferry.findings import Level
from sync.gateway.control.info import RegionDescription
from sync.gateway.engine.custody import ClientRole
from sync.pci import Identity
from sync.registers.errors import FeatureNotCarried, SnapshotFailed
from sync.registers.find import load_profiles
from sync.registers.profile.locate import DeviceView

VIEW = DeviceView(0x1AF4, 0x1042, 0x1AF4, 2, 0x018000, bytes(256), {})


@dataclass
class Leased:
    """A connection with the lease, and what the device says through it."""

    error: Exception | None
    roles: list[ClientRole]

    async def connect(self, path: str, *, role: ClientRole, session: str) -> "Leased":
        self.roles.append(role)
        return self

    async def __aenter__(self) -> "Leased":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def offer(self) -> bytes:
        if self.error is not None:
            raise self.error
        return b""


def test_a_device_that_was_replaced_is_told_as_long_as_the_option_names_another() -> None:
    info: Any = SimpleNamespace(device_path="/run/new", device_option="/run/old")
    found = gateway._replaced("gateway", info)
    assert found is not None and found.level == "note"
    assert "change --device to /run/new" in found.advice and "/run/old" in found.text
    info.device_option = "/run/new"
    assert gateway._replaced("gateway", info) is None


@pytest.mark.parametrize(
    ("flags", "told"), [({0: 7, 1: 3, 2: 4}, "region 0, 2 for mmap"), ({0: 3}, "")]
)
def test_what_a_device_offers_for_mmap_is_told_to_be_hidden(
    flags: dict[int, int], told: str
) -> None:
    """The gateway sees every access, or none can be migrated; a polled device pays for it."""
    regions = {index: RegionDescription(value, 4096) for index, value in flags.items()}
    info: Any = SimpleNamespace(
        regions=regions,
        identity=Identity(1, 2, 3, 4, 5, 6),
        config_space=b"",
        supports=SimpleNamespace(v2=False, precopy=False),
        holds={},
    )
    finding = gateway._hidden(info)
    assert (told in finding.text if finding else "") if told else finding is None


@pytest.mark.parametrize(
    ("error", "lease", "state", "expected"),
    [
        (None, None, "passthrough", None),
        (FeatureNotCarried("the guest uses ring_packed"), None, "passthrough", "ring_packed"),
        (SnapshotFailed("refused"), None, "passthrough", None),
        (FeatureNotCarried("the guest uses ring_packed"), ClientRole.SOURCE, "mediated", ""),
        (FeatureNotCarried("the guest uses ring_packed"), None, "released", ""),
    ],
)
def test_negotiated_features(
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    lease: ClientRole | None,
    state: str,
    expected: str | None,
) -> None:
    leased = Leased(error, [])
    monkeypatch.setattr(gateway, "GatewayClient", leased)
    monkeypatch.setattr(gateway, "view_of", lambda info: VIEW)
    monkeypatch.setattr(gateway, "source_for", lambda *_: leased)
    info: Any = SimpleNamespace(lease=lease, state=state)
    wish = Wish("auto", "auto", load_profiles())
    found = trio.run(gateway._negotiated, "/control", info, wish)
    assert leased.roles == ([] if expected == "" else [ClientRole.SOURCE])
    if expected:
        assert found is not None
        assert (found.level, found.check) == (Level.PROBLEM, "device 1af4:1042")
        assert expected in found.text
    else:
        assert found is None
