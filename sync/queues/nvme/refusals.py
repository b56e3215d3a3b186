"""What a controller may have that cannot be carried to another one, and the commands that begin it.

Owns the names. Each is refused rather than lost: a guest that relies on it would notice.
"""

from enum import Enum

from sync.queues.nvme.specification import Admin, Io, Sqe


class Refusal(Enum):
    """The value is what a user reads."""

    UNSEEN = (
        "its queues were made before the gateway saw it: let the guest reset the controller, "
        "or start it behind the gateway"
    )
    LOST_TRACK = "the guest and the controller disagree about their queues: reset the controller"
    FATAL = "the controller reports a fatal status: reset it"
    SHUTDOWN = "the guest is shutting the controller down: wait until it is done"
    ENTRY_SIZES = "its entries have other sizes than 64 and 16 bytes"
    SHADOW_DOORBELLS = "shadow doorbells are set up (for QEMU's nvme: dbcs=off)"
    HOST_MEMORY_BUFFER = "it uses a host memory buffer"
    CONTROLLER_MEMORY = "its controller memory buffer is in use"
    PERSISTENT_MEMORY = "its persistent memory region is enabled"
    SCATTERED_QUEUE = "a queue does not lie in one piece"
    FOREIGN_QUEUE = "a queue does not lie in guest memory (a controller memory buffer)"
    RESERVATIONS = "reservations are registered on a namespace"
    FIRMWARE = "firmware was sent to it or activated"
    DIRECTIVES = "directives (streams) are set up"
    VIRTUALIZATION = "resources of its virtual functions were changed"
    SECURITY = "security commands were sent: a session may be open"
    NAMESPACES = (
        "namespaces were formatted, made, deleted or attached since the gateway took their "
        "inventory: start the gateway anew"
    )
    SANITIZE = "it was told to sanitize, and nobody can tell whether that has ended"


FOR_GOOD = frozenset({Refusal.NAMESPACES, Refusal.SANITIZE, Refusal.RESERVATIONS, Refusal.FIRMWARE})
"""What a reset of the controller does not end."""

_ADMIN: dict[int, Refusal] = {
    Admin.DOORBELL_BUFFER: Refusal.SHADOW_DOORBELLS,
    Admin.NAMESPACE_MANAGEMENT: Refusal.NAMESPACES,
    Admin.NAMESPACE_ATTACHMENT: Refusal.NAMESPACES,
    Admin.FORMAT: Refusal.NAMESPACES,
    Admin.FIRMWARE_COMMIT: Refusal.FIRMWARE,
    Admin.FIRMWARE_DOWNLOAD: Refusal.FIRMWARE,
    Admin.DIRECTIVE_SEND: Refusal.DIRECTIVES,
    Admin.VIRTUALIZATION: Refusal.VIRTUALIZATION,
    Admin.SECURITY_SEND: Refusal.SECURITY,
    Admin.SANITIZE: Refusal.SANITIZE,
}
_IO: dict[int, Refusal] = {
    Io.RESERVATION_REGISTER: Refusal.RESERVATIONS,
    Io.RESERVATION_ACQUIRE: Refusal.RESERVATIONS,
}


def refusal_of(command: Sqe, *, admin: bool) -> Refusal | None:
    """What a command brings about, from its submission on: it may take effect before it is seen to
    have succeeded."""
    return (_ADMIN if admin else _IO).get(command.opcode)
