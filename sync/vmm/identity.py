"""Which VMM it is: what the two sides of a migration compare before anything is touched."""

from dataclasses import dataclass

from sync.vmm.driver import Vmm
from sync.vmm.errors import QmpProtocolError, VmmRefused


@dataclass(frozen=True, slots=True)
class VmmIdentity:
    """A VMM as it names itself."""

    name: str
    version: str
    """`11.1.3`; empty for a VMM that is no QEMU."""
    machine: str
    """The machine's type with its version; a QEMU loads the stream of the same type only. Empty
    where the VMM does not tell."""

    @property
    def is_qemu(self) -> bool:
        return bool(self.version)

    def __str__(self) -> str:
        text = f"{self.name} {self.version}".strip()
        return f"{text} ({self.machine})" if self.machine else text


async def identify(vmm: Vmm) -> VmmIdentity:
    """Asks `vmm`. Raises `VmmError`."""
    greeting = vmm.client.version
    try:
        numbers = [int(greeting["qemu"][part]) for part in ("major", "minor", "micro")]
    except (KeyError, TypeError, ValueError) as error:
        raise QmpProtocolError("the VMM's greeting tells no version") from error
    machine = await _machine(vmm)
    if not any(numbers):
        return VmmIdentity(str(greeting.get("package")), "", machine)
    return VmmIdentity("QEMU", ".".join(map(str, numbers)), machine)


async def _machine(vmm: Vmm) -> str:
    try:
        answer = await vmm.execute("qom-get", {"path": "/machine", "property": "type"})
    except VmmRefused as error:
        if error.error_class == "CommandNotFound":
            return ""
        raise
    return str(answer).removesuffix("-machine")
