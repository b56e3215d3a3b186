"""What can go wrong with register state. Where a peer may be at fault, the class says so."""

from collections.abc import Sequence
from typing import NamedTuple

from sync.errors import SyncError


class RegisterError(SyncError):
    """Register state could not be read, carried or written."""


class ProfileError(RegisterError):
    """A register profile is malformed; the message names the key and what is allowed."""

    exit_name = "usage"


class ProfileMismatch(RegisterError):
    """A profile claims a device that does not have what the profile describes."""

    exit_name = "refused"


class NoMethod(RegisterError):
    """A device offers nothing by which its registers could be moved.

    `draft` is a profile to start from, where one could be written.
    """

    def __init__(self, message: str, draft: str = "") -> None:
        super().__init__(message)
        self.draft = draft


class FeatureNotCarried(RegisterError):
    """A guest uses a feature of its device that its profile does not carry; nothing is touched."""

    exit_name = "refused"


class MethodMismatch(RegisterError):
    """The two sides cannot use the same method for a device, or differ in its profile."""

    exit_name = "refused"


class SnapshotFailed(RegisterError):
    """A device refused an access that its profile asked for, or its selector did not stay put."""


class JournalOverflow(RegisterError):
    """Register operations were lost because nobody took them in time; start again."""


class RestartRefused(RegisterError):
    """The device did not take back its state."""


class PayloadError(RegisterError):
    """The peer sent register state that is malformed, out of bounds or not expected now."""

    exit_name = "peer_protocol"


class SequenceError(PayloadError):
    """The peer left out or repeated a part of the register state (I4)."""


class RefusedAccess(RegisterError):
    """The guest wrote to a register of which the profile says that it cannot be replayed."""


class Difference(NamedTuple):
    """Something that has to be the same on both sides and is not."""

    name: str
    """A register as `name` or `name[bank index]`, or a property of the device."""
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.name}: {self.source} on the source, {self.target} on the target"


class _Differ(RegisterError):
    _shown = 8

    def __init__(self, what: str, differences: Sequence[Difference]) -> None:
        self.differences = tuple(differences)
        lines = [str(each) for each in self.differences[: self._shown]]
        if len(self.differences) > self._shown:
            lines.append(f"and {len(self.differences) - self._shown} more")
        super().__init__(f"{what}: {'; '.join(lines)}")


class IdentityMismatch(_Differ):
    """The target's device is another one, or built differently: give it the same device."""

    exit_name = "refused"


class RegisterMismatch(_Differ):
    """Registers are not equal on both sides though their state was carried over."""
