"""`vfio-ferry gateway`: the options of the gateway, and nothing else of it."""

from dataclasses import dataclass, replace
from pathlib import Path

from ferry.config import natural, option, port, size
from ferry.errors import ConfigError, Exit
from ferry.metrics import HELP as METRICS
from ferry.metrics import PORT_HELP as METRICS_PORT
from ferry.metrics import GatewayMetrics
from ferry.private import check_folders
from ferry.progress import Reporter
from sync.gateway.control.blocking import upgrade
from sync.gateway.datapath.journal import DEFAULT_RECORDS
from sync.gateway.engine.busy_poll import WINDOW_S
from sync.gateway.engine.core import Limits
from sync.gateway.engine.succession import START_S
from sync.gateway.errors import ControlProtocolError, GatewayUnreachable
from sync.gateway.main import GatewayOptions
from sync.gateway.main import run as run_gateway
from sync.registers.find import load_profiles
from sync.registers.record import RECORD_BYTES

MAX_BUSY_POLL_US = 1000
MIN_JOURNAL_BYTES, MAX_JOURNAL_BYTES = 64 << 10, 4 << 30
UPGRADE_S = START_S + 15.0
"""The gateway has answered by then."""
HOST_FUNCTION, BY_IOMMUFD = "vfio:", "iommufd:"
"""What the address of a PCI function follows."""


def busy_poll(text: str) -> int:
    """Microseconds."""
    value = natural(text)
    if value > MAX_BUSY_POLL_US:
        raise ValueError(f"at most {MAX_BUSY_POLL_US}")
    return value


def journal_bytes(text: str) -> int:
    """Memory for register accesses, in bytes."""
    value = size(text)
    if not MIN_JOURNAL_BYTES <= value <= MAX_JOURNAL_BYTES:
        raise ValueError("from 64K to 4G")
    return value


@dataclass(frozen=True, kw_only=True)
class Options:
    listen: str = option("where the VMM's vfio-user device connects", "")
    device: str = option(
        "where the device listens, which need not be there yet; or vfio:ADDRESS, a PCI function of"
        " this host that vfio-pci has; or iommufd:ADDRESS, the same by its character device",
        "",
    )
    control: str = option("where send and receive connect")
    queues: bool = option(
        "have a device process that offers no migration by itself move by its queues (NVMe)", False
    )
    bind: bool = option("with vfio:ADDRESS: bind it to vfio-pci, and back at the end", False)
    busy_poll: int = option(
        "microseconds that it polls before it sleeps, where the next message is likely; 0: none",
        round(WINDOW_S * 1e6),
        parse=busy_poll,
    )
    journal_size: int = option(
        "memory for register accesses that send has not taken; when it is full, the migration"
        " fails and the guest goes on",
        DEFAULT_RECORDS * RECORD_BYTES,
        parse=journal_bytes,
    )
    profile: tuple[str, ...] = option(
        "a device profile, or a folder of them, beside the built-in ones: by it the device comes"
        " back when its process has died",
        (),
        repeat=True,
    )
    metrics_file: str | None = option(METRICS, None)
    metrics_port: int | None = option(METRICS_PORT, None, parse=port)
    records: str | None = option(
        "file that says what became of each migration; it has to outlive the gateway and, for a"
        " guest that was moved away, the host's power (default: CONTROL.records)",
        None,
    )
    upgrade: bool = option(
        "have the gateway that listens at --control be replaced, while its guest runs, by what the"
        " command that it was started with starts now",
        False,
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    if options.upgrade:
        return _upgrade(options)
    for name in ("listen", "device"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is missing")
    check_folders((options.listen, options.control))
    if not options.device.startswith((HOST_FUNCTION, BY_IOMMUFD)):
        if options.bind:
            raise ConfigError(f"--bind goes with --device {HOST_FUNCTION}ADDRESS")
        _serve(options, str(Path(options.device).absolute()) if options.queues else "")
        return Exit.OK
    from sync.vfio.sysfs import PciFunction, parse_address

    _, _, address = options.device.partition(":")
    function = PciFunction(parse_address(address))
    before = function.bind() if options.bind else function.driver
    try:
        function.require_vfio()
        function.require_viable()
        by_iommufd = options.device.startswith(BY_IOMMUFD)
        _serve(options, f"{BY_IOMMUFD if by_iommufd else ''}{function.address}")
    finally:
        if options.bind:
            function.restore(before)
    return Exit.OK


def _upgrade(options: Options) -> int:
    try:
        done = upgrade(options.control, UPGRADE_S)
    except OSError as error:
        why_not = error.strerror or "it says nothing"
        raise GatewayUnreachable(
            f"no gateway answers at {options.control} ({why_not}): is it running?"
        ) from error
    except ControlProtocolError as error:
        raise GatewayUnreachable(
            f"what listens at {options.control} does not answer as a gateway does"
        ) from error
    text = f"the gateway is process {done.pid} now"
    Reporter("gateway", as_json=options.json).event("message", text=text)
    return Exit.OK


def _serve(options: Options, host_function: str) -> None:
    gateway = GatewayOptions(
        vmm_path=Path(options.listen),
        device_path=None if host_function else Path(options.device),
        host_function=host_function,
        control_path=Path(options.control),
        records_path=Path(options.records) if options.records else None,
        json=options.json,
        busy_poll_s=options.busy_poll / 1e6,
        origins=() if host_function else load_profiles([Path(each) for each in options.profile]),
        limits=Limits(journal_records=options.journal_size // RECORD_BYTES),
    )
    if options.metrics_file or options.metrics_port:
        metrics = GatewayMetrics(options.metrics_file, options.metrics_port)
        gateway = replace(gateway, observe=metrics.take)
    run_gateway(gateway)
