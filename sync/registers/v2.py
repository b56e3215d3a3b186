"""Register synchronisation by the device's own state stream: VFIO migration v2.

Owns the order of migration states and of the stream's bytes; what is in them only the device
knows. Source of the states: VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE in QEMU's
docs/interop/vfio-user.rst.

    source                                           target
    RUNNING                                          RUNNING (after reset)
    begin: PRE_COPY, if offered   -- STATE* -------> RESUMING with the first bytes
    precopy: what there is        -- STATE* ------->
    quiesce: STOP_COPY
    final: the rest               -- STATE*, END --> finish: STOP, the device judges its state
                                                     gateway.start: RUNNING
    rollback: RUNNING
"""

import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from sync.errors import DeviceRefusal
from sync.registers.errors import PayloadError, RegisterError, RestartRefused, SequenceError
from sync.registers.interface import (
    GatewayPort,
    Method,
    RegisterReport,
    SourceRegisters,
    StateLeft,
    TargetRegisters,
)
from sync.registers.payload import (
    Assembler,
    PayloadKind,
    encode_json,
    split,
    take_number,
    with_number,
)
from sync.vfio_user.features import MigrationState

CHUNK_BYTES = 128 << 10
PRECOPY_BYTES = 16 << 20
"""Taken in one round: a device that always has more does not hold us up."""
MEASURED_BYTES = 1 << 20
"""With less of it nothing is known of how fast a device's state moves."""
UNMEASURED_NS_PER_BYTE = 20.0
"""50 MB/s: what two busy cores carry with both gateways at work."""
MAX_STREAM_BYTES = 16 << 30
"""A stream that is longer than this is no state of a device that we could move in time."""


class StreamSource(SourceRegisters):
    """See `interface.SourceRegisters`. `offered` is what every method tells about the device."""

    method: ClassVar[Method] = "v2"
    capture: ClassVar[bool] = False
    # In STOP_COPY the device does no DMA, and its log of it stays readable.
    fence: ClassVar[bool] = False

    def __init__(self, port: GatewayPort, offered: dict[str, Any], *, precopy: bool) -> None:
        self._port = port
        self._offered = offered
        self._has_precopy = precopy
        self._state = MigrationState.RUNNING
        self._sent_bytes = 0
        self._taking_s = 0.0
        """What all of it took, with the sending."""
        self._latest_bytes = 0
        """Of the last turn while the guest ran."""

    async def offer(self) -> bytes:
        return encode_json(PayloadKind.OFFER, self._offered)

    async def snapshot(self) -> bytes:
        return b""

    async def begin(self, values: bytes, journal_seq: int) -> AsyncIterator[bytes]:
        if self._has_precopy:
            await self._enter(MigrationState.PRE_COPY)
            async for payload in self.precopy():
                yield payload

    async def precopy(self) -> AsyncIterator[bytes]:
        if self._state is MigrationState.PRE_COPY:
            before = self._sent_bytes
            async for payload in self._read(PRECOPY_BYTES):
                yield payload
            self._latest_bytes = self._sent_bytes - before

    async def state_left(self) -> StateLeft | None:
        """As the device tells it; of one that does not, what it last had in `precopy`."""
        left = await self._port.mig_size()
        if left is None and self._has_precopy:
            left = self._latest_bytes
        if left is None:
            return None
        if left > MAX_STREAM_BYTES:
            raise _too_long(left)
        return StateLeft(left, self._ns_per_byte())

    def _ns_per_byte(self) -> float:
        if self._sent_bytes < MEASURED_BYTES:
            return UNMEASURED_NS_PER_BYTE
        return self._taking_s * 1e9 / self._sent_bytes

    async def quiesce(self) -> None:
        await self._enter(MigrationState.STOP_COPY)

    def resume_records(self) -> bytes:
        return b""

    async def final(self) -> AsyncIterator[bytes]:
        if self._state is not MigrationState.STOP_COPY:
            raise RegisterError("the device has to be at rest before its last state is read")
        async for payload in self._read(MAX_STREAM_BYTES):
            yield payload
        for payload in split(PayloadKind.END, with_number(self._sent_bytes)):
            yield payload

    async def rollback(self) -> None:
        if self._state is not MigrationState.RUNNING:
            await self._enter(MigrationState.RUNNING)

    def report(self) -> RegisterReport:
        return RegisterReport(method=self.method, state_bytes=self._sent_bytes)

    async def _enter(self, state: MigrationState) -> None:
        # Set before it is known to have worked: `rollback` has to undo what may have happened.
        self._state = state
        await self._port.mig_state(state)

    async def _read(self, limit_bytes: int) -> AsyncIterator[bytes]:
        taken_bytes = 0
        while taken_bytes < limit_bytes:
            began = time.monotonic()
            chunk = await self._port.mig_read(CHUNK_BYTES)
            if chunk:
                for payload in split(PayloadKind.STATE, with_number(self._sent_bytes, chunk)):
                    yield payload
                self._sent_bytes += len(chunk)
                taken_bytes += len(chunk)
                self._taking_s += time.monotonic() - began
            if len(chunk) < CHUNK_BYTES:
                return
        if limit_bytes == MAX_STREAM_BYTES:
            raise _too_long(taken_bytes)


def _too_long(length: int) -> RegisterError:
    return RegisterError(
        f"the device's state has {length} bytes or more; {MAX_STREAM_BYTES} can be moved"
    )


class StreamTarget(TargetRegisters):
    """See `interface.TargetRegisters`."""

    method: ClassVar[Method] = "v2"

    def __init__(self, port: GatewayPort) -> None:
        self._port = port
        self._assembler = Assembler()
        self._received_bytes = 0
        self._resuming = False
        self._ended = False
        self._stopped = False

    async def check(self) -> None:
        """All that can be compared without reading the device has been compared already."""

    async def receive(self, payload: bytes) -> None:
        whole = self._assembler.add(payload)
        if whole is None:
            return
        kind, body = whole
        position, data = take_number(body)
        if self._ended or kind not in (PayloadKind.STATE, PayloadKind.END):
            raise PayloadError(f"{kind.name} is not expected now")
        if position != self._received_bytes:
            raise SequenceError(
                f"byte {self._received_bytes} of the device's state was expected, {position} came"
            )
        if kind is PayloadKind.END:
            if data:
                raise PayloadError("the end of the device's state carries bytes")
            self._ended = True
            return
        if self._received_bytes + len(data) > MAX_STREAM_BYTES:
            raise PayloadError(f"the device's state is longer than {MAX_STREAM_BYTES} bytes")
        if not self._resuming:
            await self._port.mig_state(MigrationState.RESUMING)
            self._resuming = True
        await self._port.mig_write(data)
        self._received_bytes += len(data)

    async def finish(self) -> RegisterReport:
        if not self._ended or not self._resuming:
            raise PayloadError("the source did not send all of the device's state")
        if not self._stopped:
            try:
                await self._port.mig_state(MigrationState.STOP)
            except DeviceRefusal as error:
                raise RestartRefused(
                    f"the target's device does not accept its state: {error}"
                ) from error
            self._stopped = True
        return RegisterReport(method=self.method, state_bytes=self._received_bytes)

    def start_records(self) -> bytes:
        return b""
