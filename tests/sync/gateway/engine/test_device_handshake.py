"""What the gateway finds out about a device, and what it does with one that lies."""

import os
import socket
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sync.errors import SyncError
from sync.gateway.control.info import GatewayInfo
from sync.gateway.control.shapes import pack, unpack
from sync.gateway.control.wire import ControlDecoder, encode
from sync.gateway.engine.core import Core, Limits
from sync.gateway.engine.device_handshake import handshake
from sync.gateway.engine.device_link import DeviceLink
from sync.pci import Identity
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.protocol import (
    FLAG_REPLY,
    HEADER,
    Capabilities,
    Command,
    DeviceInfo,
    MigrationState,
    TwinSocket,
    Version,
    VfioUserError,
    encode_message,
)
from tests.sync.gateway.conftest import Bench
from tests.sync.gateway.model_device import ModelDevice


def _shake(
    device: ModelDevice, bodies: dict[Command | int, bytes] | None = None, twin: int = -1
) -> DeviceLink:
    """Runs the handshake with `device`; `bodies` replaces its replies by command."""
    sent: list[bytes] = []
    link = DeviceLink(
        lambda data, fds: sent.append(bytes(data)),
        lambda: 0.0,
        deadline_s=1.0,
        journal_records=1,
        generation=1,
    )
    outcome: list[SyncError | None] = []
    link.runner.start(handshake(link.facts), lambda _, error: outcome.append(error), held=False)
    try:
        while sent:
            message = sent.pop(0)
            reply = device.execute(message, 0)
            number, command, *_ = HEADER.unpack_from(message)
            if bodies and command in bodies:
                reply = encode_message(number, command, bodies[command], reply=True)
            _, _, _, flags, error = HEADER.unpack_from(reply)
            descriptors = [twin] if command == Command.VERSION and twin >= 0 else []
            errno = error if flags != FLAG_REPLY else 0
            link.relay.from_device(
                number, command, FLAG_REPLY, errno, memoryview(bytearray(reply)), descriptors
            )
        if outcome and outcome[0] is not None:
            raise outcome[0]
    except SyncError:
        link.close()
        raise
    return link


def test_a_device_is_described_by_itself(make_bench: Callable[..., Bench]) -> None:
    facts = make_bench(v2=True, logging=True).link.facts
    assert facts.identity == Identity(0x1AF4, 0x1042, 0, 0, 1, 0x010000)
    assert (facts.supports.v2, facts.supports.precopy, facts.supports.logging) == (True,) * 3
    assert facts.running
    assert len(facts.config_space) == 256
    plain = make_bench().link.facts.supports
    assert (plain.v2, plain.precopy, plain.logging, plain.reset) == (False, False, False, True)


def test_logging_needs_all_of_its_three_commands(make_bench: Callable[..., Bench]) -> None:
    device = make_bench(logging=True).device
    device.features.refuse = {8}
    assert not _shake(device).facts.supports.logging


def test_a_device_that_was_left_stopped_is_known_as_such(make_bench: Callable[..., Bench]) -> None:
    device = make_bench(v2=True).device
    device.features.state = MigrationState.STOP
    assert not _shake(device).facts.running


@pytest.mark.parametrize(
    ("command", "body"),
    [
        (Command.VERSION, b""),
        (Command.VERSION, b"\1\0\0\0"),
        (Command.VERSION, Version(capabilities=Capabilities(twin_socket=TwinSocket(True))).pack()),
        (
            Command.VERSION,
            Version(capabilities=Capabilities(twin_socket=TwinSocket(True, 5))).pack(),
        ),
        (Command.DEVICE_GET_INFO, DeviceInfo(3, 1 << 30, 5).pack()),
        (Command.DEVICE_GET_INFO, DeviceInfo(3, 9, 1 << 30).pack()),
        (Command.DEVICE_GET_REGION_INFO, bytes(31)),
        (Command.DEVICE_GET_IRQ_INFO, bytes(3)),
        (Command.REGION_READ, bytes(16)),
        (Command.REGION_READ, bytes(15)),
    ],
)
def test_i9_a_device_that_lies_is_a_protocol_error(
    make_bench: Callable[..., Bench], command: int, body: bytes
) -> None:
    with pytest.raises(ProtocolError):
        _shake(make_bench().device, {command: body})


@given(st.sampled_from([1, 4, 5, 7, 9, 16]), st.binary(max_size=64))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i9_any_answer_ends_in_facts_or_a_typed_error(
    make_bench: Callable[..., Bench], command: int, body: bytes
) -> None:
    bench = make_bench(v2=True, logging=True)
    try:
        link = _shake(bench.device, {command: body})
    except SyncError:
        pass
    else:
        link.close()
    bench.close()


def test_a_twin_socket_that_is_not_wanted_is_closed(
    make_bench: Callable[..., Bench], open_fds: Callable[[], int]
) -> None:
    bench = make_bench()
    before = open_fds()
    ours, theirs = socket.socketpair()
    link = _shake(bench.device, twin=os.dup(theirs.fileno()))
    assert link.facts.twin == -1
    link.close()
    bench.device.capabilities = Capabilities(twin_socket=TwinSocket(True, 0))
    link = _shake(bench.device, twin=os.dup(theirs.fileno()))
    assert link.facts.twin >= 0
    link.close()
    for end in (ours, theirs):
        end.close()
    assert open_fds() == before


def test_a_status_crosses_the_socket_unchanged(make_bench: Callable[..., Bench]) -> None:
    core = Core(Limits(), lambda: 0.0, lambda *_, **__: None, lambda *_: None)
    bench = make_bench(v2=True)
    core.link, core.facts, core.ready = bench.link, bench.link.facts, True
    core.custody.fence("s")
    info = core.info()
    decoder = ControlDecoder(0)
    decoder.feed(encode(*pack(info)[:2]), [])
    received = decoder.next_message()
    assert received is not None
    assert unpack(GatewayInfo, received) == info


def test_a_refused_region_is_left_out(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_bench().device
    execute = device._execute

    def refuse(command: int, body: bytes, n_descriptors: int) -> bytes:
        if command == Command.DEVICE_GET_REGION_INFO and body[8] == 8:
            raise VfioUserError(22)
        return execute(command, body, n_descriptors)

    monkeypatch.setattr(device, "_execute", refuse)
    assert sorted(_shake(device).facts.regions) == list(range(8))
