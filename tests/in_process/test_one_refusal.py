"""One thing that is asked for is refused, or its answer lost: each request to a gateway, and each
command to a VMM. The guest runs afterwards, on one host, with its device."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from ferry.errors import Exit
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.requests import REQUESTS, ControlHello, Request
from sync.gateway.engine.custody import CustodyState, Owner
from sync.gateway.errors import GatewayError
from sync.handover.states import HandoverState as State
from tests.in_process.deaths import SETTLED_S
from tests.in_process.two_hosts import METHODS, Command, Method, TwoHosts, two_hosts

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

AT_ONCE = 8
SETTLED = (CustodyState.PASSTHROUGH, Owner.OWNED)
COMMANDS = {"a": 44, "b": 26}
"""Of the source's and the target's VMM, at least so many in a migration."""

Case = Callable[[Path, Method], Awaitable[None]]


def run_all(folder: Path, cases: list[tuple[str, Case]]) -> None:
    async def run(number: int, turn: trio.CapacityLimiter) -> None:
        name, case = cases[number]
        place = folder / str(number)
        place.mkdir()
        method = METHODS[number % len(METHODS)]
        try:
            async with turn:
                await case(place, method)
        except BaseException as error:
            error.add_note(f"{name}, {method}")
            raise

    async def main() -> None:
        turn = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for number in range(len(cases)):
                nursery.start_soon(run, number, turn)

    trio.run(main)


async def assert_settled(hosts: TwoHosts, sender: Command, receiver: Command) -> None:
    """As the commands say, after `resolve` where they ask for it."""
    assert Exit.INTERNAL not in (sender.code, receiver.code)
    if Exit.OWNER_FAILED in (sender.code, receiver.code):
        assert (await hosts.resolve(hosts.b, "target"))["outcome"] == "committed"
    with trio.fail_after(SETTLED_S):
        while not (hosts.a.vmm.runs or hosts.b.vmm.runs):  # noqa: ASYNC110
            await trio.sleep(0.01)  # its gateway is bringing it back
    moved = sender.code in (Exit.OK, Exit.OWNER_FAILED)
    assert hosts.b.vmm.runs is moved
    assert hosts.a.vmm.runs is not moved
    assert not hosts.ran_twice
    assert (hosts.b if moved else hosts.a).record == SETTLED


@dataclass
class Fault:
    """The first request of this kind to this host's gateway fails."""

    request: type[Request[Any]]
    gateway: str
    met: bool = False


@pytest.mark.parametrize("done", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_i8_a_request_to_a_gateway(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool, interrupted: bool
) -> None:
    call: Callable[..., Awaitable[Any]] = GatewayClient._call
    faults: dict[str, Fault] = {}

    async def faulty(gateway: GatewayClient, request: Request[Any]) -> Any:
        path = "" if gateway._closed else str(gateway._sock.getpeername())
        fault = faults.get(path)
        if fault is not None and type(request) is fault.request and not fault.met:
            fault.met = True
            if done:
                await call(gateway, request)
            raise GatewayError("as the test wants it")
        return await call(gateway, request)

    monkeypatch.setattr(GatewayClient, "_call", faulty)

    def case(request: type[Request[Any]], name: str) -> Case:
        async def migrate(folder: Path, method: Method) -> None:
            async with two_hosts(folder, method) as hosts:
                (path,) = (hosts.a if name == "a" else hosts.b).flags["gateway"]
                faults[path] = Fault(request, name)
                sender, receiver = await hosts.migrate(hosts.a, stop_late)
                del faults[path]
                await assert_settled(hosts, sender, receiver)

        return migrate

    def stop_late(phase: str, sender: Command, receiver: Command) -> None:
        if interrupted and phase == State.AWAITING_READY.value:
            sender.stop.ask("enough of it")

    requests = [each for each in REQUESTS.values() if each is not ControlHello]
    run_all(
        short_path,
        [(f"{each.op} at {name}", case(each, name)) for each in requests for name in "ab"],
    )


@pytest.mark.parametrize("how", ["refused", "not answered", "hung up"])
@pytest.mark.parametrize("name", COMMANDS)
def test_i8_a_command_to_a_vmm(short_path: Path, how: str, name: str) -> None:
    def case(number: int) -> Case:
        async def migrate(folder: Path, method: Method) -> None:
            async with two_hosts(folder, method) as hosts:
                vmm = (hosts.a if name == "a" else hosts.b).vmm
                vmm.commands = Script(number, how, vmm)
                sender, receiver = await hosts.migrate(hosts.a)
                await assert_settled(hosts, sender, receiver)

        return migrate

    run_all(short_path, [(f"command {n} {how}", case(n)) for n in range(COMMANDS[name])])


class Script(list[str]):
    """The commands of `vmm`, which is told of each before it is answered."""

    def __init__(self, number: int, how: str, vmm: Any) -> None:
        super().__init__()
        self._number, self._how, self._vmm = number, how, vmm

    def append(self, command: str) -> None:
        super().append(command)
        at = len(self) - 1 - self._number
        if at == 0 and self._how == "refused":
            self._vmm.errors[command] = "as the test wants it"
        elif at == 0 and self._how == "not answered":
            self._vmm.silent.add(command)
        elif at == 0:
            raise trio.BrokenResourceError
        else:
            self._vmm.errors.clear()
            self._vmm.silent.clear()
