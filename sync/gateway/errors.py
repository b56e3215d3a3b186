"""What can go wrong at a gateway: one class for each code of the control protocol.

The code crosses the control socket, the class is what either side raises. A new failure gets a
class here and nothing else.
"""

from typing import ClassVar

from sync.errors import DeviceRefusal, SyncError


class GatewayError(SyncError):
    """A gateway could not do what it was asked for. `code` is the word on the wire."""

    code: ClassVar[str] = "failed"

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or type(self).code))

    @property
    def message(self) -> str:
        return str(self.args[0])


class ControlProtocolError(GatewayError):
    """The other side of the control socket broke the protocol; the connection is closed."""

    code = "protocol"


class AnswerLost(GatewayError):
    """An answer that took something out of the gateway was cut off: mediate anew."""

    code = "answer-lost"


class BadRequest(GatewayError):
    """The request has a missing, unknown or out-of-range field."""

    code = "bad-request"


class ControlVersionMismatch(GatewayError):
    """The gateway speaks another version of the control protocol: use one release of both."""

    exit_name = "refused"

    code = "version"


class GatewayUnreachable(GatewayError):
    """No gateway answers at this control socket: start it, or check the path."""

    code = "unreachable"


class GatewayLost(GatewayError):
    """The gateway closed the control connection: it has ended, or it cut this client off."""

    code = "gateway-lost"


class SocketInUse(GatewayError):
    """Another process listens at this socket path: stop it, or choose another path."""

    exit_name = "local"

    code = "socket-in-use"


class WrongState(GatewayError):
    """The gateway's state does not allow this request."""

    code = "wrong-state"


class LeaseHeld(GatewayError):
    """Another process holds the lease of this gateway: only one migration at a time."""

    code = "lease-held"


class LeaseRequired(GatewayError):
    """Only the holder of the lease for the right role may ask for this."""

    code = "lease-required"


class WrongSession(GatewayError):
    """The gateway's ownership record belongs to another session."""

    code = "wrong-session"


class SessionFenced(GatewayError):
    """This session was fenced here: it can never own the guest at this gateway."""

    code = "fenced"


class UnknownSession(GatewayError):
    """No session is on record at this gateway."""

    exit_name = "refused"

    code = "unknown-session"


class NotProven(GatewayError):
    """The verdict was not given by the other side's record of this session."""

    exit_name = "refused"

    code = "not-proven"


class NotRecorded(GatewayError):
    """What was decided cannot be written to the gateway's records, so it does not hold."""

    code = "not-recorded"


class RecordsUnusable(GatewayError):
    """The gateway's records cannot be used."""

    exit_name = "local"

    code = "records"


class NoDevice(GatewayError):
    """The device is not connected: start it at the path the gateway was given."""

    code = "no-device"


class NoVmm(GatewayError):
    """No VMM is connected to the gateway."""

    code = "no-vmm"


class VmmOutOfReach(GatewayError):
    """The gateway cannot reach the VMM's QMP socket: let its user open it, by an absolute path."""

    exit_name = "local"

    code = "vmm-out-of-reach"


class DeviceLost(GatewayError):
    """The device went away or stopped answering; the VMM was disconnected with it."""

    code = "device-lost"


class NewDeviceUnreachable(GatewayError):
    """Nothing answers where the new device should be: start it, or check the path."""

    exit_name = "unreachable"

    code = "no-new-device"


class AnotherDevice(GatewayError):
    """The device that came in the place of one that had died is another one."""

    exit_name = "refused"

    code = "another-device"


class VmmLost(GatewayError):
    """The VMM went away; the device's DMA and interrupts are gone with it."""

    exit_name = "vmm"

    code = "vmm-lost"


class DeviceRefused(GatewayError, DeviceRefusal):
    """The device answered with an error."""

    code = "device-error"


class DeviceTimeout(GatewayError):
    """The device did not answer in time; the guest was not held up by this."""

    code = "device-timeout"


class Unsupported(GatewayError):
    """The device does not offer what this request needs."""

    code = "unsupported"


class LayoutUnaligned(GatewayError):
    """A region of guest memory does not begin and end at a page, so its pages have no numbers."""

    code = "unaligned"


class LayoutChanged(GatewayError):
    """The guest's memory was mapped anew between two replies: ask again from the start."""

    code = "layout-changed"


class UpgradeFailed(GatewayError):
    """Another process could not take this gateway's place: it goes on."""

    exit_name = "local"

    code = "upgrade"


class Defect(GatewayError):
    """The gateway met what it is not made for; this one request failed: please report it."""

    code = "defect"


def told(error: Exception) -> SyncError:
    """Any exception as one that a controller can be told of."""
    if isinstance(error, SyncError):
        return error
    if isinstance(error, OSError):
        return GatewayError(f"the gateway lacks something: {error.strerror}")
    return Defect(f"the gateway met what it is not made for: {type(error).__name__}: {error}")


_CLASSES: list[type[GatewayError]] = [GatewayError, *GatewayError.__subclasses__()]
BY_CODE = {cls.code: cls for cls in _CLASSES}


def error_for(code: str, message: str) -> GatewayError:
    """The error that a reply's `code` stands for; an unknown code gives a plain `GatewayError`."""
    cls = BY_CODE.get(code, GatewayError)
    return cls(message if cls.code == code else f"{code}: {message}")
