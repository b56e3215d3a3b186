"""Every error that may end a command has an exit code of its own class, and none is told as a
defect by accident."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import ferry
import lab
import sync
import transport
from ferry.errors import Exit, FerryError
from ferry.exit_codes import exit_code_of
from lab.devices.errors import DeviceError
from sync.errors import SyncError
from sync.gateway.errors import ControlVersionMismatch, GatewayUnreachable, SocketInUse, VmmLost
from sync.registers.errors import IdentityMismatch, PayloadError, ProfileError, RegisterMismatch
from sync.vmm.errors import VmmGone
from transport.wire import errors as transport_errors

ROOMS = (transport, sync, ferry, lab)

DEFECTS = {
    "transport.wire.errors.TransportError",
    "transport.wire.errors.LinkFailed",
    "sync.handover.machine.LocalProtocolError",
    "ferry.errors.FerryError",
    "lab.testbed.TestbedError",
}
"""Told as a defect on purpose."""


def errors() -> Iterator[type[Exception]]:
    """Every class of exception in the rooms that may end a command: those of a room's own root.

    What derives from Exception directly is caught where it is raised.
    """
    roots = (transport_errors.TransportError, SyncError, FerryError)
    for room in ROOMS:
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            if module.name.endswith("__main__"):
                continue
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and issubclass(value, roots):
                    yield value


@pytest.mark.parametrize("cls", sorted(set(errors()), key=lambda cls: f"{cls.__module__}.{cls}"))
def test_every_error_has_an_exit_code(cls: type[Exception]) -> None:
    code = exit_code_of(cls.__new__(cls))
    name = f"{cls.__module__}.{cls.__qualname__}"
    assert code.meaning
    assert code is not Exit.OK
    assert (code is Exit.INTERNAL) == (name in DEFECTS), f"{name} has to say its exit code"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (transport_errors.PeerUnreachable("x"), Exit.UNREACHABLE),
        (transport_errors.PeerLost("x"), Exit.PEER_LOST),
        (transport_errors.PeerClosed("x"), Exit.PEER_LOST),
        (transport_errors.FrameError("x"), Exit.PEER_PROTOCOL),
        (transport_errors.RecordError("x"), Exit.PEER_PROTOCOL),
        (transport_errors.EndpointError("x"), Exit.LOCAL),
        (transport_errors.LayoutMismatch("x"), Exit.REFUSED),
        (transport_errors.VersionMismatch("x"), Exit.REFUSED),
        (SyncError("x"), Exit.DEVICE),
        (GatewayUnreachable("x"), Exit.DEVICE),
        (SocketInUse("x"), Exit.LOCAL),
        (VmmLost("x"), Exit.VMM),
        (ControlVersionMismatch("x"), Exit.REFUSED),
        (VmmGone("x"), Exit.VMM),
        (ProfileError("x"), Exit.USAGE),
        (PayloadError("x"), Exit.PEER_PROTOCOL),
        (IdentityMismatch("x", ()), Exit.REFUSED),
        (RegisterMismatch("x", ()), Exit.DEVICE),
        (DeviceError("x"), Exit.LOCAL),
        (OSError(), Exit.LOCAL),
        (MemoryError(), Exit.LOCAL),
        (ModuleNotFoundError("x", name="numba"), Exit.LOCAL),
        (ImportError("libzmq.so.5", name="zmq.backend.cython._zmq"), Exit.LOCAL),
        (ImportError("cannot import name", name="sync.memory"), Exit.INTERNAL),
        (RuntimeError(), Exit.INTERNAL),
    ],
)
def test_what_a_command_ends_with(error: Exception, code: Exit) -> None:
    assert exit_code_of(error) is code
