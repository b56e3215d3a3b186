"""A device that is changed to another process, as `vfio-ferry replace` has it done."""

from pathlib import Path

import trio

from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole


def replace_device(control: Path, device: Path) -> None:
    """Has the gateway at `control` change to the device process at `device`."""

    async def ask() -> None:
        async with await GatewayClient.connect(control, role=ClientRole.SOURCE) as gateway:
            await gateway.prepare_device(str(device))
            await gateway.switch_device()

    trio.run(ask)
