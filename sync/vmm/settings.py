"""The VMM's own settings of a migration: what is put back, and what keeps its stream closed.

Owns the names. Asking and setting is `driver`'s, and `recover`'s when the controller has died.
Source: QEMU's qapi/migration.json.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from sync.vmm.errors import QmpProtocolError, VmmNotReady

THROTTLE = "auto-converge"
THROTTLE_PARAMETERS = ("max-cpu-throttle", "cpu-throttle-initial", "cpu-throttle-increment")
SLEEPING_THROTTLE = dict.fromkeys(("cpu-throttle-initial", "max-cpu-throttle"), 1) | {
    "cpu-throttle-increment": 1
}
"""The least that a VMM takes: a processor that is throttled so runs for 99 % of the time. The
capability cannot be changed while the VMM migrates, these can."""
DEFAULT_BYTES_PER_S = 128 << 20
"""QEMU's own `max-bandwidth`."""
CAPABILITIES = ("events", "pause-before-switchover", THROTTLE)
PARAMETERS = ("downtime-limit", "max-bandwidth", *THROTTLE_PARAMETERS)

CLOSING_CAPABILITIES = {
    "multifd": "the pages are in other connections",
    "mapped-ram": "the stream is a file",
    "x-ignore-shared": "the pages are not in the stream",
    "postcopy-ram": "the target may ask for pages",
    "xbzrle": "pages may be deltas",
    "compress": "pages may be compressed",
    "x-colo": "the stream goes on for ever",
    "background-snapshot": "pages are sent once only",
    "zero-copy-send": "pages are sent from other memory",
    "rdma-pin-all": "the pages are not in the stream",
    "dirty-bitmaps": "the disks' bitmaps are sent while the guest runs",
}
"""Capabilities with which a stream cannot be opened, and why."""


@dataclass(frozen=True)
class MigrationSettings:
    """Those settings of a VMM that a migration by us changes; only what the VMM knows."""

    capabilities: dict[str, bool]
    parameters: dict[str, int]

    @classmethod
    def of(cls, capabilities: Any, parameters: Any) -> Self:
        """Out of a VMM's answers. Raises `QmpProtocolError`."""
        states = _states(capabilities)
        if not isinstance(parameters, dict):
            raise QmpProtocolError("query-migrate-parameters returned no object")
        return cls(
            {name: states[name] for name in CAPABILITIES if name in states},
            {name: parameters[name] for name in PARAMETERS if type(parameters.get(name)) is int},
        )

    @property
    def most_bytes_per_s(self) -> int | None:
        """The VMM's bandwidth, if somebody has chosen it."""
        bandwidth = self.parameters.get("max-bandwidth", DEFAULT_BYTES_PER_S)
        return None if bandwidth == DEFAULT_BYTES_PER_S else bandwidth

    def commands(self) -> list[tuple[str, dict[str, Any]]]:
        """The QMP commands that set all of it."""
        wanted = [{"capability": n, "state": state} for n, state in self.capabilities.items()]
        commands: list[tuple[str, dict[str, Any]]] = []
        if wanted:
            commands.append(("migrate-set-capabilities", {"capabilities": wanted}))
        if self.parameters:
            commands.append(("migrate-set-parameters", dict(self.parameters)))
        return commands

    def check_throttle(self) -> None:
        """Raises `VmmNotReady` if the VMM cannot slow its processors down."""
        if THROTTLE not in self.capabilities or any(
            name not in self.parameters for name in THROTTLE_PARAMETERS
        ):
            raise VmmNotReady(
                f"the VMM has no {THROTTLE!r}: use --on-stall switch or abort instead of throttle"
            )

    def pack(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def unpack(cls, text: str) -> Self:
        """What `pack` made. Raises `QmpProtocolError` for anything else."""
        try:
            values = json.loads(text)
            capabilities, parameters = values["capabilities"], values["parameters"]
            rows = [{"capability": name, "state": on} for name, on in capabilities.items()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise QmpProtocolError("these are no settings of a migration") from error
        return cls.of(rows, parameters)


def why_closed(capabilities: Any, parameters: Any) -> str:
    """Why a VMM with these settings has a stream that cannot be opened; empty if it may be.

    Raises `QmpProtocolError`.
    """
    states = _states(capabilities)
    for name, reason in CLOSING_CAPABILITIES.items():
        if states.get(name):
            return f"the VMM's capability {name} is on: {reason}"
    if isinstance(parameters, dict) and parameters.get("tls-creds"):
        return "the VMM encrypts it (tls-creds)"
    return ""


def _states(capabilities: Any) -> dict[str, bool]:
    if not isinstance(capabilities, list):
        raise QmpProtocolError("query-migrate-capabilities returned no list")
    rows = [row for row in capabilities if isinstance(row, dict)]
    return {str(row.get("capability")): row.get("state") is True for row in rows}
