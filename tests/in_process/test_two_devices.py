"""A VM with two devices: whatever dies, and between whichever two steps, both devices and the guest
are on one host afterwards."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from sync.gateway.control.client import GatewayClient
from sync.handover.states import HandoverState as State
from tests.in_process.deaths import STATES, VICTIMS, assert_owner, fail, move, settle
from tests.in_process.two_devices import SECOND, TwoHostsOfTwo, tell_devices
from tests.in_process.two_hosts import METHODS, Command, Method, two_hosts

ALL_VICTIMS = (
    *VICTIMS,
    *(f"{what}{SECOND}" for what in ("gateway a", "device a", "gateway b", "device b")),
)


@pytest.mark.full
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.value)
def test_i7_i8_killed(short_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_devices(monkeypatch)

    async def kill(victim: str, method: Method) -> None:
        folder = short_path / victim.replace(" ", "-")
        folder.mkdir()
        try:
            async with two_hosts(folder, method, TwoHostsOfTwo) as hosts:
                owner = await fail(hosts, state, victim)
                if owner.vmm.alive:
                    await move(hosts, owner)
        except BaseException as error:
            error.add_note(f"{victim} killed in {state.value}, {method}")
            raise

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number, victim in enumerate(ALL_VICTIMS):
                method = METHODS[(STATES.index(state) + number) % len(METHODS)]
                nursery.start_soon(kill, victim, method)

    trio.run(main)


BETWEEN = [
    *[("send", call) for call in ("mediate", "stop", "release", "passthrough", "moved")],
    *[("receive", call) for call in ("standby", "own", "start", "fence", "abandon")],
]


@pytest.mark.parametrize(("victim", "call"), BETWEEN, ids=lambda each: each)
def test_i7_i8_killed_between_two_gateways(
    short_path: Path, victim: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gateway has been asked for something, and nobody is left to ask the other one."""
    tell_devices(monkeypatch)
    ask: Callable[..., Awaitable[Any]] = getattr(GatewayClient, call)
    commands: dict[str, Command] = {}

    async def asked(gateway: GatewayClient, *args: Any, **options: Any) -> Any:
        answer = await ask(gateway, *args, **options)
        if commands:
            commands.pop(victim).kill()
            commands.clear()
            await trio.lowlevel.checkpoint()
        return answer

    def on_phase(phase: str, sender: Command, receiver: Command) -> None:
        if phase == State.PREPARING.value:
            commands.update(send=sender, receive=receiver)
        if phase == State.AWAITING_READY.value and call in ("passthrough", "fence", "abandon"):
            sender.stop.ask("enough of it")

    async def main() -> None:
        async with two_hosts(short_path, METHODS[0], TwoHostsOfTwo) as hosts:
            with monkeypatch.context() as patched:
                patched.setattr(GatewayClient, call, asked)
                sender, receiver = await hosts.migrate(hosts.a, on_phase)
            assert not commands
            owner = await settle(hosts, sender, receiver)
            await assert_owner(hosts, owner)
            await move(hosts, owner)

    trio.run(main)
