"""`vfio-ferry gateway`: the options of the gateway, and nothing else of it."""

from dataclasses import dataclass
from pathlib import Path

from ferry.config import option
from ferry.errors import Exit
from sync.gateway.main import GatewayOptions
from sync.gateway.main import run as run_gateway


@dataclass(frozen=True, kw_only=True)
class Options:
    listen: str = option("where the VMM's vfio-user device connects")
    device: str = option("where the device listens; it need not be there yet")
    control: str = option("where send and receive connect")
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    run_gateway(
        GatewayOptions(
            vmm_path=Path(options.listen),
            device_path=Path(options.device),
            control_path=Path(options.control),
            json=options.json,
        )
    )
    return Exit.OK
