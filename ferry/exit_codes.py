"""The exit code of a command for each error that it may end with, and the error in one line."""

from ferry.errors import Exit, FerryError
from sync.errors import SyncError


def describe(error: BaseException) -> str:
    """One line for a user: the error's own words, or its class's docstring."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = str(error)
    return text or (type(error).__doc__ or type(error).__name__).splitlines()[0]


def exit_code_of(error: BaseException) -> Exit:
    """The exit code of any error that a command may end with."""
    if isinstance(error, FerryError):
        return error.exit_code
    if isinstance(error, OSError | MemoryError):
        return Exit.LOCAL
    for names, code in _ROOM_CODES:
        if any(cls.__module__ + "." + cls.__qualname__ in names for cls in type(error).__mro__):
            return code
    return Exit.DEVICE if isinstance(error, SyncError) else Exit.INTERNAL


_ROOM_CODES: tuple[tuple[frozenset[str], Exit], ...] = (
    (frozenset({"transport.wire.errors.PeerUnreachable"}), Exit.UNREACHABLE),
    (frozenset({"transport.wire.errors.PeerLost"}), Exit.PEER_LOST),
    (
        frozenset(
            {
                "transport.wire.errors.EndpointError",
                "transport.kernels.clib.NativeLibraryError",
                "transport.kernels.declare.CompilationFailed",
                "lab.devices.errors.DeviceError",
                "sync.gateway.errors.SocketInUse",
            }
        ),
        Exit.LOCAL,
    ),
    (
        frozenset({"lab.guest.errors.GuestOptionsError", "sync.registers.errors.ProfileError"}),
        Exit.USAGE,
    ),
    (
        frozenset(
            f"transport.wire.errors.{name}"
            for name in ("PeerRefused", "VersionMismatch", "LayoutMismatch")
        ),
        Exit.REFUSED,
    ),
    (
        frozenset(
            {
                "transport.wire.errors.FrameError",
                "transport.wire.errors.RecordError",
                "sync.handover.machine.RemoteProtocolError",
            }
        ),
        Exit.PEER_PROTOCOL,
    ),
    (frozenset({"sync.vmm.errors.VmmError", "sync.gateway.errors.VmmLost"}), Exit.VMM),
    (
        frozenset(
            f"sync.registers.errors.{name}"
            for name in ("IdentityMismatch", "MethodMismatch", "ProfileMismatch")
        ),
        Exit.REFUSED,
    ),
)
"""By name, so that a command does not import the rooms that it does not need. First match wins."""
