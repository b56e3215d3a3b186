"""A gateway has another one of its VM put its device back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from sync.gateway.control import take_back
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.records import Terms
from sync.gateway.errors import LeaseHeld, NotProven
from tests.sync.gateway.conftest import House, ServedDevice

PROOF = "fenced:s:yes"


async def let_go(path: Path) -> GatewayClient:
    """The `send` that has let this gateway go, and holds it."""
    holder = await GatewayClient.connect(path, role=ClientRole.SOURCE, session="s")
    await holder.mediate(tracker="none", capture=True, terms=Terms(False, "yes", "no"))
    await holder.stop(fence=True)
    await holder.release("s")
    return holder


@pytest.mark.parametrize("ended_by_us", [True, False])
def test_i8_a_process_that_hangs_and_holds_the_other_gateway_is_ended(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    monkeypatch: pytest.MonkeyPatch,
    ended_by_us: bool,
) -> None:
    """It was cut off at the gateway that decides, for its silence; the other one, which has let go
    of its device already, waits for it for ever."""
    monkeypatch.setattr(take_back, "HELD_S", 0.0)
    house = make_house()
    house.serve(make_device())
    house.vmm()
    ended: list[str] = []

    async def main() -> None:
        holder = await let_go(house.control_path)

        def end_holder() -> None:
            ended.append("once")
            trio.from_thread.run(holder.aclose)

        def back() -> None:
            path = str(house.control_path)
            take_back.take_back(path, "s", PROOF, 5.0, end_holder if ended_by_us else None)

        if ended_by_us:
            await trio.to_thread.run_sync(back)
        else:
            with pytest.raises(LeaseHeld):
                take_back.take_back(str(house.control_path), "s", PROOF, 0.1)
            await holder.aclose()
            await trio.to_thread.run_sync(house.wait_event, "lease-lost")
            with pytest.raises(NotProven):
                take_back.take_back(str(house.control_path), "s", "fenced:s:no", 5.0)
            await trio.to_thread.run_sync(back)
        async with await GatewayClient.connect(house.control_path) as observer:
            assert (observer.info.state, observer.info.owner) == ("passthrough", "owned")

    trio.run(main)
    assert ended == ["once"] * ended_by_us
