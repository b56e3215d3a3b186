"""The target's fence: what it says of a session, whatever has become of its gateway."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from ferry.migration.target_devices import Lease, fence
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.core import Limits
from sync.gateway.engine.custody import ClientRole
from sync.gateway.errors import DeviceLost
from tests.sync.gateway.conftest import House, ServedDevice


@pytest.fixture
def house(short_path: Path) -> Iterator[House]:
    house = House(short_path, Limits())
    yield house
    house.close()


def test_what_is_gone_is_named_by_what_went_first(house: House) -> None:
    """With a device or a VMM goes the other's connection; a device comes back at once."""

    async def fenced_after(loss: Callable[[], None], event: str, session: str) -> Exception | None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.TARGET, session=session
        ) as gateway:
            await gateway.standby(session)
            await trio.to_thread.run_sync(loss)
            await trio.to_thread.run_sync(house.wait_event, event)
            done, lost = await fence([Lease(gateway, session)], start_asked=False)
            assert done
            assert (await gateway.verdict(session)).fate == "fenced"
            return lost

    async def main() -> None:
        server = house.serve(ServedDevice())
        vmm = house.vmm()
        assert await fenced_after(vmm.close, "vmm-lost", "s") is None
        house.wait_event("device-connected", 2)
        house.vmm()
        lost = await fenced_after(lambda: house.end_device(server), "device-lost", "t")
        assert isinstance(lost, DeviceLost)

    trio.run(main)


def test_i9_the_name_of_an_earlier_session_is_no_reason_to_fail(house: House) -> None:
    """It may have run the guest here: what a sender calls so now is another one, and is over."""

    async def main() -> None:
        house.serve(ServedDevice())
        house.vmm()
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.TARGET, session="s"
        ) as gateway:
            await gateway.standby("s")
            await gateway.own("s")
            await gateway.start()
            await gateway.running("s")
            assert await fence([Lease(gateway, "s")], start_asked=False) == (True, None)
            assert (await fence([Lease(gateway, "s")], start_asked=True))[0] is False
            assert (await gateway.status()).state == "passthrough"

    trio.run(main)
