"""What both sides look at before a gateway's device takes part in a migration."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

from ferry.errors import LocalError
from ferry.migration.messages import DeviceOffer
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.info import GatewayInfo
from sync.memory import MemoryRegion
from sync.registers.profile.locate import DeviceView


def offer_of(info: GatewayInfo, registers: bytes, place: str = "") -> DeviceOffer:
    """What the greeting says about a device, which its VMM has at `place`."""
    return DeviceOffer(
        identity=asdict(info.identity),
        regions=[[index, region.size] for index, region in sorted(info.regions.items())],
        irqs=[[index, irq.count] for index, irq in sorted(info.irqs.items())],
        registers=registers.hex(),
        place=place,
    )


def view_of(info: GatewayInfo) -> DeviceView:
    """The device as the choice of a method and a profile looks at it."""
    identity = info.identity
    return DeviceView(
        vendor=identity.vendor,
        device=identity.device,
        subsystem_vendor=identity.subsystem_vendor,
        subsystem=identity.subsystem,
        class_code=identity.class_code,
        config_space=info.config_space,
        region_sizes={index: region.size for index, region in info.regions.items()},
        v2=info.supports.v2,
        precopy=info.supports.precopy,
        holds=info.holds,
    )


async def check_gateway(path: str, client: GatewayClient) -> GatewayInfo:
    """The status of the gateway at `path`. Raises `LocalError` if it has no device or no VMM and so
    cannot take part in a migration."""
    info = await client.status()
    if not info.device_connected:
        raise LocalError(f"the gateway at {path} has no device: start the device and try again")
    if not info.vmm_connected:
        raise LocalError(f"no VMM is connected to the gateway at {path}: start it and try again")
    return info


@asynccontextmanager
async def memory_of(gateway: GatewayClient) -> AsyncIterator[list[MemoryRegion]]:
    """The guest memory that `gateway` sees; its descriptors are open until the block ends."""
    regions = await gateway.memory()
    try:
        yield regions
    finally:
        for region in regions:
            os.close(region.fd)
