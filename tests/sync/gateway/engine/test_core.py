"""The gateway without its sockets: what waits for a busy device, and what must not wait."""

from collections.abc import Callable, Sequence

import pytest

from sync.gateway.control.requests import VERSION
from sync.gateway.control.server import ControlServer
from sync.gateway.control.wire import ControlMessage, Fields
from sync.gateway.engine.core import Core, Limits
from sync.gateway.engine.custody import ClientRole
from sync.registers.record import STRUCT, Op
from sync.vfio_user.protocol import HEADER, Command, Version
from sync.vmm import recover
from tests.sync.gateway.conftest import Bench
from tests.sync.gateway.model_device import ModelDevice

READ_RECORD = STRUCT.pack(0, 0, 0, 0, 4, Op.READ, 0)


class Caller:
    """A control connection without a socket."""

    def __init__(self, server: ControlServer) -> None:
        self.role: ClientRole | None = None
        self.session = ""
        self.busy = False
        self.closed = False
        self.replies: list[Fields] = []
        self._server = server

    def reply(
        self,
        fields: Fields,
        blob: bytes,
        descriptors: Sequence[int],
    ) -> None:
        self.busy = False
        self.replies.append(fields)

    def ask(self, op: str, blob: bytes = b"", **fields: object) -> None:
        self._server.handle(self, ControlMessage({"op": op, **fields}, blob, []))


class Desk:
    """A core with a model device that answers when it is told to."""

    def __init__(self, device: ModelDevice) -> None:
        self.device = device
        self.sent: list[bytes] = []
        self.recovered: list[str] = []
        self.now = 0.0
        self.core = Core(
            Limits(),
            lambda: self.now,
            lambda *_, **__: None,
            lambda armed, session, proof: self.recovered.append(armed.qmp_path),
        )
        self.server = ControlServer(self.core)
        self.core.device_came(lambda data, fds: self.sent.append(bytes(data)), lambda _: None)
        self.settle()
        self.core.vmm_came(lambda data, fds: None, Version())

    def step(self) -> None:
        reply = self.device.execute(self.sent.pop(0), 0)
        number, command, _, flags, error = HEADER.unpack_from(reply)
        errno = error if flags & 0x20 else 0
        relay = self.core.link.relay
        relay.from_device(number, command, flags, errno, memoryview(bytearray(reply)), [])

    def settle(self) -> None:
        while self.sent:
            self.step()

    def caller(self, role: str, session: str = "") -> Caller:
        caller = Caller(self.server)
        caller.ask("hello", version=VERSION, role=role, session=session)
        return caller

    def leave(self, caller: Caller) -> None:
        caller.closed = True
        self.core.lease_lost(caller)


@pytest.fixture
def desk(make_bench: Callable[..., Bench]) -> Desk:
    return Desk(make_bench().device)


def test_i7_a_lost_target_is_fenced_at_once_whatever_its_device_is_doing(desk: Desk) -> None:
    holder = desk.caller("target", "s")
    holder.ask("standby", session="s")
    desk.settle()
    holder.ask("reset_device")
    assert desk.core.busy
    desk.leave(holder)
    assert desk.core.custody.records.fate("s") == "fenced"
    assert desk.core.custody.state == "standby", "the rest has to wait"
    desk.settle()
    assert desk.core.custody.state == "passthrough"
    assert desk.core.lease is None


def test_requests_wait_for_a_busy_device_and_a_status_does_not(desk: Desk) -> None:
    holder, observer = desk.caller("source"), desk.caller("observer")
    holder.ask("mediate", tracker="none", page_size=4096, capture=True)
    holder.ask("batch", READ_RECORD)
    waiting = desk.caller("target")
    observer.ask("status")
    assert observer.replies[-1]["state"] == "mediated"
    assert waiting.replies == []
    desk.settle()
    assert waiting.replies[-1]["error"] == "lease-held"


def test_a_lease_that_ends_in_the_middle_of_a_job_is_cleaned_up_behind_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "obstacle", lambda path: "")
    holder = desk.caller("source")
    holder.ask("arm_recovery", qmp_path="/qmp", deadline_s=1, ran=True)
    holder.ask("mediate", READ_RECORD, tracker="none", page_size=4096, capture=True)
    assert desk.core.busy
    desk.leave(holder)
    assert len(holder.replies) == 2, "nobody is there to be answered"
    desk.settle()
    assert desk.core.custody.state == "passthrough"
    assert desk.recovered == ["/qmp"]


def test_a_vmm_that_the_gateway_could_not_resume_is_told_of_when_it_is_named(desk: Desk) -> None:
    holder = desk.caller("source")
    for path, why in (("qmp", "no absolute path"), ("/dev/null", "no socket"), ("/no", "No such")):
        holder.ask("arm_recovery", qmp_path=path, deadline_s=1, ran=True)
        assert holder.replies[-1]["error"] == "vmm-out-of-reach"
        assert why in holder.replies[-1]["message"]
    assert desk.core.lease.recovery is None


def test_what_waited_is_answered_when_the_device_goes(desk: Desk) -> None:
    holder = desk.caller("source")
    holder.ask("batch", READ_RECORD)
    other = desk.caller("observer")
    assert other.replies == []
    desk.core.device_lost("gone")
    assert holder.replies[-1]["error"] == "device-lost"
    assert other.replies[-1]["ok"] is True
    holder.ask("passthrough")
    assert holder.replies[-1]["ok"] is True
    holder.ask("mediate", tracker="none", page_size=4096, capture=True)
    assert holder.replies[-1]["error"] == "device-lost"


def test_a_device_that_was_left_stopped_runs_with_the_first_access(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(v2=True)
    bench.device.features.state = type(bench.device.features.state).STOP
    desk = Desk(bench.device)
    relay = desk.core.link.relay
    bench.device.commands.clear()

    def read() -> None:
        message = HEADER.pack(1, Command.REGION_READ, 32, 0, 0) + b"\0" * 12 + b"\4\0\0\0"
        relay.from_vmm(1, Command.REGION_READ, 0, 0, memoryview(bytearray(message)), [])

    read()
    read()
    desk.settle()
    assert bench.device.commands == [
        Command.DEVICE_FEATURE,
        Command.DEVICE_FEATURE,
        Command.REGION_READ,
        Command.REGION_READ,
    ]
    assert bench.device.features.state.name == "RUNNING"
