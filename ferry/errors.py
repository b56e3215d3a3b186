"""What a user is told when something goes wrong, and the exit code that goes with it.

An error's docstring says what happened and what to do, and its class has the exit code. The classes
of `transport` and `sync`, which know nothing of commands, have its name (`exit_name`), which
`exit_code_of` looks up here. `vfio-ferry exit-codes` prints the table.
"""

from enum import IntEnum
from typing import Self


class Exit(IntEnum):
    """The exit codes of every command, each with what it means for the guest."""

    meaning: str

    def __new__(cls, code: int, meaning: str = "") -> Self:
        self = int.__new__(cls, code)
        self._value_ = code
        self.meaning = meaning
        return self

    OK = (
        0,
        "done; for send and receive: the target owns the guest and it runs there; for a "
        "check: it would work",
    )
    INTERNAL = 1, "a defect of vfio-ferry; please report it with the output of --debug"
    USAGE = 2, "an option or a configuration file is wrong; nothing was touched"
    LOCAL = 3, "something on this host is missing or not permitted (file, socket, memory, disk)"
    UNREACHABLE = 4, "nobody answers at the peer's address; the guest was not touched"
    PEER_LOST = 5, "the peer went away; the guest continues on the source"
    REFUSED = 6, "the two sides do not match (version, layout, device, profile); nothing touched"
    PEER_PROTOCOL = 7, "the peer broke the protocol; the guest continues on the source"
    DEVICE = 8, "a gateway or its device failed or does not fit; the guest stays on the source"
    VMM = 9, "the VMM failed or refused; the guest stays on the source"
    NOT_CONVERGED = 10, "the dirty set did not become small enough; the guest stays on the source"
    TIMEOUT = 11, "a deadline passed; the guest stays on the source"
    INTERRUPTED = 12, "stopped by a signal; the guest stays on the source"
    VERIFICATION = 13, "the two copies could not be made equal; the guest stays on the source"
    PEER_ABORTED = 14, "the peer gave up, its own message says why; the guest is on the source"
    NOT_READY = 15, "doctor found what stands in the way of a migration, and says what to do"
    SLOW = 16, "the guest has moved, but stood still for longer than --downtime-limit allows"
    DEVICE_SILENT = (
        17,
        "the guest has moved and runs on the target, but a device there does not work for it",
    )
    IN_DOUBT = 20, "the commit was sent and not answered; run `vfio-ferry resolve` on both hosts"
    BROKEN = 21, "the source could not be restored; run `vfio-ferry resolve`"
    OWNER_FAILED = 22, "the target owns the guest but could not start it; run `vfio-ferry resolve`"
    REGRESSED = 30, "bench compare: something got measurably worse"


class FerryError(Exception):
    """Something went wrong in the composition of a command."""

    exit_code = Exit.INTERNAL


class ConfigError(FerryError):
    """An option or a configuration file is wrong."""

    exit_code = Exit.USAGE


class LocalError(FerryError):
    """Something on this host is missing or not permitted."""

    exit_code = Exit.LOCAL


class Mismatch(FerryError):
    """The two sides do not fit together; nothing was touched."""

    exit_code = Exit.REFUSED


class Unreachable(FerryError):
    """The peer's address leads nowhere; nothing was touched."""

    exit_code = Exit.UNREACHABLE


class NotOwner(FerryError):
    """The guest here has been let go of in an earlier migration; nothing was touched."""

    exit_code = Exit.REFUSED


class PeerProtocolError(FerryError):
    """The peer sent something that makes no sense."""

    exit_code = Exit.PEER_PROTOCOL


class PeerAborted(FerryError):
    """The peer gave up and said why."""

    exit_code = Exit.PEER_ABORTED


class NotConverged(FerryError):
    """The device dirties pages faster than they can be sent."""

    exit_code = Exit.NOT_CONVERGED


class DeadlinePassed(FerryError):
    """A phase took longer than it may."""

    exit_code = Exit.TIMEOUT


class Interrupted(FerryError):
    """A signal asked for an end before the commit."""

    exit_code = Exit.INTERRUPTED


class NotEqual(FerryError):
    """The two copies differ and repair did not help."""

    exit_code = Exit.VERIFICATION


class QemuError(LocalError):
    """Something about QEMU or its guest on this machine is not as it has to be."""


class QemuMissing(QemuError):
    """There is no QEMU with vfio-user-pci here, and none can be made."""
