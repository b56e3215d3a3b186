"""What a user is told when something goes wrong, and the exit code that goes with it.

An error's docstring says what happened and what to do. Errors of `transport` and `sync` keep
their own classes; `exit_code_of` maps every class that may reach a user to its code, and
`vfio-ferry exit-codes` prints the table.
"""

from enum import IntEnum


class Exit(IntEnum):
    """The exit codes of every command."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    LOCAL = 3
    UNREACHABLE = 4
    PEER_LOST = 5
    REFUSED = 6
    PEER_PROTOCOL = 7
    DEVICE = 8
    VMM = 9
    NOT_CONVERGED = 10
    TIMEOUT = 11
    INTERRUPTED = 12
    VERIFICATION = 13
    PEER_ABORTED = 14
    NOT_READY = 15
    IN_DOUBT = 20
    BROKEN = 21
    OWNER_FAILED = 22
    REGRESSED = 30


EXIT_MEANING = {
    Exit.OK: "done; for send and receive: the target owns the guest and it runs there; for a "
    "check: it would work",
    Exit.INTERNAL: "a defect of vfio-ferry; please report it with the output of --debug",
    Exit.USAGE: "an option or a configuration file is wrong; nothing was touched",
    Exit.LOCAL: "something on this host is missing or not permitted (file, socket, memory, disk)",
    Exit.UNREACHABLE: "nobody answers at the peer's address; the guest was not touched",
    Exit.PEER_LOST: "the peer went away; the guest continues on the source",
    Exit.REFUSED: "the two sides do not match (version, layout, device, profile); nothing touched",
    Exit.PEER_PROTOCOL: "the peer broke the protocol; the guest continues on the source",
    Exit.DEVICE: "a gateway or its device failed or does not fit; the guest stays on the source",
    Exit.VMM: "the VMM failed or refused; the guest stays on the source",
    Exit.NOT_CONVERGED: "the dirty set did not become small enough; the guest stays on the source",
    Exit.TIMEOUT: "a deadline passed; the guest stays on the source",
    Exit.INTERRUPTED: "stopped by a signal; the guest stays on the source",
    Exit.VERIFICATION: "the two copies could not be made equal; the guest stays on the source",
    Exit.PEER_ABORTED: "the peer gave up, its own message says why; the guest is on the source",
    Exit.NOT_READY: "doctor found what stands in the way of a migration, and says what to do",
    Exit.IN_DOUBT: "the commit was sent and not answered; run `vfio-ferry resolve` on both hosts",
    Exit.BROKEN: "the source could not be restored; run `vfio-ferry resolve --role source`",
    Exit.OWNER_FAILED: "the target owns the guest but could not start it; run `vfio-ferry resolve`",
    Exit.REGRESSED: "bench compare: something got measurably worse",
}


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
