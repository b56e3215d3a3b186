"""VFIO migration v2 of a device: its state, the arcs, and the stream of migration data.

Owns in which state a device is and what is read from or written to its stream. Does not own the
table of legal transitions (`lab.vfio_user.migration_arcs`) nor what a device's state consists of.

Before it stops, a device's stream has its identity, so that a target can be refused early; after
that the state follows. Requests in flight are completed by stopping and are in no stream.
"""

import errno
from collections.abc import Callable
from typing import Protocol

from lab.devices.errors import StateStreamError
from lab.devices.state_stream import MAX_STREAM_BYTES, Section, pack_section, unpack_stream
from lab.vfio_user.migration_arcs import IllegalTransition, path
from sync.vfio_user.protocol import MigrationState, VfioUserError

_STOP = MigrationState.STOP
_RUNNING = MigrationState.RUNNING
_STOP_COPY = MigrationState.STOP_COPY
_RESUMING = MigrationState.RESUMING
_PRE_COPY = MigrationState.PRE_COPY


class Migratable(Protocol):
    """What a device does for its migration. `stop` returns when its DMA has ended."""

    def stop(self) -> None: ...

    def start(self) -> None: ...

    def identity(self) -> bytes: ...

    def save(self) -> bytes: ...

    def load(self, identity: bytes, state: bytes) -> None:
        """Take a saved state over, or raise `StateStreamError` and stay unchanged."""


class Migration:
    """The migration state machine of one device, for one thread."""

    def __init__(self, device: Migratable) -> None:
        self.state = _RUNNING
        self._device = device
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._actions: dict[tuple[MigrationState, MigrationState], Callable[[], None]] = {
            (_RUNNING, _STOP): device.stop,
            (_STOP, _RUNNING): device.start,
            (_RUNNING, _PRE_COPY): self._send_identity,
            (_PRE_COPY, _RUNNING): self._end_session,
            (_PRE_COPY, _STOP_COPY): self._stop_and_send_state,
            (_STOP, _STOP_COPY): self._send_all,
            (_STOP_COPY, _STOP): self._end_session,
            (_STOP, _RESUMING): self._end_session,
            (_RESUMING, _STOP): self._load,
        }

    def set_state(self, target: MigrationState) -> None:
        """Go to `target`, over other states if needed. Raises `VfioUserError`.

        Data that the device cannot take over ends in ERROR, with the device stopped.
        """
        try:
            states = path(self.state, target)
        except IllegalTransition as error:
            raise VfioUserError(errno.EINVAL, str(error)) from error
        for state in states:
            self._actions[self.state, state]()
            self.state = state

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of the stream; fewer if that is all for now."""
        if self.state not in (_PRE_COPY, _STOP_COPY):
            raise VfioUserError(errno.EINVAL, f"nothing is saved in state {self.state.name}")
        data = bytes(self._outgoing[:size])
        del self._outgoing[:size]
        return data

    def write(self, data: bytes) -> None:
        """Add to the stream of the device being restored."""
        if self.state is not _RESUMING:
            raise VfioUserError(errno.EINVAL, f"nothing is restored in state {self.state.name}")
        if len(self._incoming) + len(data) > MAX_STREAM_BYTES:
            raise VfioUserError(errno.EFBIG, f"a state has at most {MAX_STREAM_BYTES} bytes")
        self._incoming += data

    def reset(self) -> None:
        """The device was reset: it runs, whatever was before."""
        self._end_session()
        if self.state not in (_RUNNING, _PRE_COPY):
            self._device.start()
        self.state = _RUNNING

    def client_lost(self) -> None:
        """End a transfer of data with the client. A device that was stopped stays so (I7)."""
        self._end_session()
        if self.state is _PRE_COPY:
            self.state = _RUNNING
        elif self.state in (_STOP_COPY, _RESUMING):
            self.state = _STOP

    def _send_identity(self) -> None:
        self._outgoing += pack_section(Section.IDENTITY, self._device.identity())

    def _send_all(self) -> None:
        self._send_identity()
        self._outgoing += pack_section(Section.STATE, self._device.save())

    def _stop_and_send_state(self) -> None:
        self._device.stop()
        self._outgoing += pack_section(Section.STATE, self._device.save())

    def _end_session(self) -> None:
        self._outgoing.clear()
        self._incoming.clear()

    def _load(self) -> None:
        try:
            self._device.load(*unpack_stream(bytes(self._incoming)))
        except StateStreamError as error:
            self.state = MigrationState.ERROR
            raise VfioUserError(errno.EINVAL, str(error)) from error
        finally:
            self._end_session()
