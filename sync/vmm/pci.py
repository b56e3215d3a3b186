"""Moves what QEMU itself knows of its vfio-user devices: PCI configuration, MSI-X table, INTx.

QEMU emulates these in part, and its own stream leaves them out: without them the guest arrives with
BARs that are not mapped and interrupts that go nowhere. Owned here: which functions there are, the
accesses and their order. Not owned: the device's own state, and the bytes (`platform_state`).

    source                                       target
    attach, locate   while the guest runs        attach    before there is a guest
    peek             while the guest runs
                                                 restore   before the stream
    save             paused, its devices stopped
                                                 restore   loaded and paused

Configuration is accessed by CF8 and CFC (PCI Local Bus Specification 3.0, 3.2.2.3.2), which every
x86 machine has and which reach every bus. A running guest uses them, too: so only while it is
paused, and CF8 is put back. Before, it is read by ECAM (PCI Express Base Specification 3.0, 7.2.2)
if the machine has it, so that little is left to do then: what is restored before the stream
survives it, unless it lies behind a bridge. What is above 255 is the device's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from sync.pci import (
    BAR0,
    CACHE_LINE,
    COMMAND,
    CONFIG_BYTES,
    INTERRUPT_LINE,
    MSI_CAPABILITY,
    MSIX_CAPABILITY,
    ROM,
)
from sync.vmm.driver import Vmm
from sync.vmm.errors import QmpProtocolError, VmmNotReady, VmmRefused
from sync.vmm.platform_state import (
    MAX_FUNCTIONS,
    STATE_OFFSETS,
    Function,
    Msix,
    Platform,
    PlatformError,
    find_capabilities,
    function_of,
    msix_at,
)
from sync.vmm.qtest import Qtest, memory_read, memory_write, port_read, port_write

DRIVER = "vfio-user-pci"
MAX_PEEK_BYTES = 1 << 17
"""What `peek` returns has to fit into a greeting."""

_CF8, _CFC = 0xCF8, 0xCFC
_CF8_ENABLE = 1 << 31
_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")
_MAX_BRIDGES = 16
"""At most so many lie on the way to a device; a guest numbers at most 256 buses."""
_ECAM_UNMAPPED = (1 << 64) - 1
_ECAM_READ_BYTES = 16
"""In one go: QEMU asks the device for each 4 of them, and the guest may have to wait."""
_ADDRESS = re.compile(r"(?P<slot>[0-9a-f]{1,2})\.(?P<function>[0-7])\Z")


class PciPlatform:
    """The vfio-user functions of one QEMU. `paths` are their QOM paths."""

    def __init__(self, vmm: Vmm, qtest: Qtest, paths: tuple[str, ...]) -> None:
        self._vmm = vmm
        self._qtest = qtest
        self._paths = paths
        self._functions: tuple[tuple[int, int], ...] = ()
        self._known: dict[tuple[int, int], bytes] = {}
        self._peeked: dict[tuple[int, int], Function] = {}

    @property
    def n_devices(self) -> int:
        return len(self._paths)

    @classmethod
    async def attach(cls, vmm: Vmm, qmp_path: str) -> "PciPlatform | None":
        """Gets hold of the machine; None where the VMM is no QEMU or has no such device.

        `qmp_path` is where `vmm` was reached. The guest does not notice. Raises `VmmError`.
        """
        paths = await find_devices(vmm)
        qtest = await Qtest.attach(vmm, qmp_path) if paths else None
        return None if qtest is None else cls(vmm, qtest, paths)

    async def aclose(self) -> None:
        await self._qtest.aclose()

    async def locate(self) -> None:
        """Finds out what does not change any more, so that `save` need not. The guest has numbered
        its buses: it is past its firmware. Raises `VmmNotReady` if it is not."""
        buses = await self._vmm.execute("query-pci")
        found = {}
        for path in self._paths:
            bus, devfn, host = await _locate(self._vmm, path, buses)
            found[bus, devfn] = host
        self._functions = tuple(sorted(found))
        for bus, devfn in self._functions:
            base = await _ecam(self._vmm, found[bus, devfn])
            if base is not None:
                address = base + (bus << 20 | devfn << 12)
                self._known[bus, devfn] = await self._read(address, CONFIG_BYTES)

    async def _read(self, address: int, size: int) -> bytes:
        """Registers of a guest that runs, which is not held up for long."""
        parts = []
        for start in range(address, address + size, _ECAM_READ_BYTES):
            parts += await self._qtest.run([memory_read(start, _ECAM_READ_BYTES)])
        return b"".join(parts)

    def _unknown(self, where: tuple[int, int]) -> list[int]:
        """The offsets that have to be read anew while the guest is paused."""
        known = self._known.get(where)
        if known is None:
            return list(range(0, CONFIG_BYTES, 4))
        capabilities = find_capabilities(known)
        offsets = [*STATE_OFFSETS]
        if MSIX_CAPABILITY in capabilities:
            offsets.append(capabilities[MSIX_CAPABILITY])
        if MSI_CAPABILITY in capabilities:
            msi_at = capabilities[MSI_CAPABILITY]
            offsets += range(msi_at, min(msi_at + 24, CONFIG_BYTES), 4)
        return offsets

    async def peek(self) -> bytes:
        """What the target may restore before the stream: after `locate`, while the guest runs.

        It has to do so, since `save` leaves out what has not changed.
        """
        peeked = {}
        for (bus, devfn), config in self._known.items():
            if bus == 0:
                function = function_of(bus, devfn, config)
                msix = msix_at(function.msix_at, config) if function.msix_at else None
                if address := _table_address(function, msix):
                    assert msix is not None
                    (table,) = await self._qtest.run([memory_read(address, msix.table_bytes)])
                    function = replace(function, msix_table=table)
                peeked[bus, devfn] = function
        blob = Platform(0, len(self._paths), tuple(peeked.values())).pack()
        if len(blob) > MAX_PEEK_BYTES:
            return Platform(0, len(self._paths), ()).pack()
        self._peeked = peeked
        return blob

    async def save(self) -> bytes:
        """What `restore` needs on the target. The guest is paused and its devices are stopped.

        INTx lines are deasserted: one that is asserted now would stay so on the target for good.
        """
        if not self._functions:
            await self.locate()
        await self._vmm.settle()
        commands = [port_read(_CF8, 4)]
        for bus, devfn in self._functions:
            commands += _config_reads(bus, devfn, self._unknown((bus, devfn)))
        cf8, *values = _values(commands, await self._qtest.run(commands))
        commands = [port_write(_CF8, 4, cf8)]
        reads: dict[tuple[int, int], int] = {}
        functions = []
        for bus, devfn in self._functions:
            offsets = self._unknown((bus, devfn))
            config = _filled(self._known.get((bus, devfn), bytes(CONFIG_BYTES)), offsets, values)
            del values[: len(offsets)]
            function = function_of(bus, devfn, config)
            msix = msix_at(function.msix_at, config) if function.msix_at else None
            if address := _table_address(function, msix):
                assert msix is not None
                reads[bus, devfn] = len(commands)
                commands.append(memory_read(address, msix.table_bytes))
            if function.uses_intx(config[INTERRUPT_LINE + 1]):
                commands += _deassert(function, msix)
            functions.append(function)
        replies = await self._qtest.run(commands)
        whole = tuple(
            replace(f, msix_table=replies[reads[f.bus, f.devfn]])
            if (f.bus, f.devfn) in reads
            else f
            for f in functions
        )
        changed = (f for f in whole if self._peeked.get((f.bus, f.devfn)) != f)
        return Platform(cf8, len(self._paths), tuple(changed)).pack()

    async def restore(self, blob: bytes) -> None:
        """Gives the functions what `peek` or `save` found. There is no guest yet, or it is paused.

        Raises `PlatformError`, before anything is changed, if the devices are not the source's.
        """
        platform, capabilities = await self._compared(blob)
        commands: list[str] = []
        for function, msix in zip(platform.functions, capabilities, strict=True):
            commands += _restoring(function, msix)
        await self._qtest.run([*commands, port_write(_CF8, 4, platform.cf8)])

    async def compare(self, blob: bytes) -> None:
        """Raises `PlatformError` where `restore` would; changes nothing but CF8."""
        platform, _ = await self._compared(blob)
        await self._qtest.run([port_write(_CF8, 4, platform.cf8)])

    async def _compared(self, blob: bytes) -> tuple[Platform, list[Msix | None]]:
        """What `blob` holds, with the MSI-X capability of each of its functions."""
        platform = Platform.unpack(blob)
        if platform.n_devices != len(self._paths):
            raise PlatformError(
                f"the source's VMM has {platform.n_devices} {DRIVER} devices, the one here "
                f"{len(self._paths)}: start both with the same devices"
            )
        return platform, [await self._check(function) for function in platform.functions]

    async def _check(self, function: Function) -> Msix | None:
        """The MSI-X capability of the device in the place of the source's `function`."""
        offsets = [0]
        for at in (function.msix_at, function.msi_at):
            offsets += [at, at + 4] if at else []
        commands = _config_reads(function.bus, function.devfn, offsets)
        values = _values(commands, await self._qtest.run(commands))
        config = _filled(bytes(CONFIG_BYTES), offsets, values)
        msix = msix_at(function.msix_at, config) if function.msix_at else None
        if (
            int.from_bytes(config[:4], "little") != function.ids
            or (msix and config[msix.at] != MSIX_CAPABILITY)
            or (msix and (msix.control ^ function.msix_control) & 0x7FF)
            or (function.msi_at and config[function.msi_at] != MSI_CAPABILITY)
        ):
            raise PlatformError(
                f"the device at {function.name} is not the source's: start both VMMs with the same "
                "devices in the same places"
            )
        return msix


async def save_platform(vmm: Vmm, qmp_path: str) -> bytes:
    """`PciPlatform.save` in one go; empty where there is nothing to save."""
    platform = await PciPlatform.attach(vmm, qmp_path)
    if platform is None:
        return b""
    try:
        return await platform.save()
    finally:
        await platform.aclose()


async def restore_platform(vmm: Vmm, qmp_path: str, blob: bytes) -> None:
    """`PciPlatform.restore` in one go. Raises `PlatformError` if there is nothing to restore to."""
    if not blob:
        return
    platform = await PciPlatform.attach(vmm, qmp_path)
    if platform is None:
        raise PlatformError(f"the source's VMM has {DRIVER} devices, the one here has none")
    try:
        await platform.restore(blob)
    finally:
        await platform.aclose()


def _restoring(function: Function, msix: Msix | None) -> list[str]:
    """The commands that give `function` its state.

    The MSI-X table needs memory decoding, so it comes behind the command register; MSI-X is enabled
    last, with the vectors that the table then has.
    """

    def write(at: int, size: int, value: int) -> list[str]:
        return _config_write(function.bus, function.devfn, at, size, value)

    commands: list[str] = []
    for index, bar in enumerate(function.bars):
        commands += write(BAR0 + 4 * index, 4, bar)
    commands += write(ROM, 4, function.rom)
    commands += write(INTERRUPT_LINE, 1, function.interrupt_line)
    commands += write(CACHE_LINE, 2, function.cache_line)
    commands += write(COMMAND, 2, function.command)
    if function.msi_at:
        for at in range(0, len(function.msi), 2):
            value = int.from_bytes(function.msi[at : at + 2], "little")
            commands += write(function.msi_at + 4 + at, 2, value)
        commands += write(function.msi_at + 2, 2, function.msi_control)
    if address := _table_address(function, msix):
        if function.msix_table:
            commands.append(memory_write(address, function.msix_table))
        commands += write(function.msix_at + 2, 2, function.msix_control)
    return commands


def _table_address(function: Function, msix: Msix | None) -> int:
    """Where the MSI-X table is in physical memory; 0 if it is nowhere."""
    if msix is None or not function.decodes_memory:
        return 0
    bar = function.bar_address(msix.table_bar)
    return bar + msix.table_offset if bar else 0


def _deassert(function: Function, msix: Msix | None) -> list[str]:
    """The commands that release INTx: QEMU takes any access to a BAR for the driver's answer to it.

    The MSI-X table does not count, since it is QEMU's own. The first register of a device is the
    one least likely to have side effects.
    """
    if not function.decodes_memory:
        return []
    bars = [index for index in function.memory_bars() if msix is None or index != msix.table_bar]
    return [memory_read(function.bar_address(bars[0]), 4)] if bars else []


def _config_reads(bus: int, devfn: int, offsets: Iterable[int]) -> list[str]:
    commands = []
    for at in offsets:
        commands += [port_write(_CF8, 4, _config_address(bus, devfn, at)), port_read(_CFC, 4)]
    return commands


def _config_write(bus: int, devfn: int, at: int, size: int, value: int) -> list[str]:
    return [
        port_write(_CF8, 4, _config_address(bus, devfn, at)),
        port_write(_CFC + at % 4, size, value),
    ]


def _config_address(bus: int, devfn: int, at: int) -> int:
    return _CF8_ENABLE | bus << 16 | devfn << 8 | at & ~3


def _filled(config: bytes, offsets: Iterable[int], values: Iterable[int]) -> bytes:
    """`config` with each 4 bytes at `offsets` replaced."""
    result = bytearray(config)
    for at, value in zip(offsets, values, strict=False):
        result[at : at + 4] = value.to_bytes(4, "little")
    return bytes(result)


def _values(commands: list[str], replies: list[bytes]) -> list[int]:
    """What the reads among `commands` returned."""
    return [
        int.from_bytes(reply, "big")
        for command, reply in zip(commands, replies, strict=True)
        if command.startswith("in")
    ]


async def find_devices(vmm: Vmm) -> tuple[str, ...]:
    """The QOM paths of the vfio-user devices; none if the VMM has no object model."""
    paths = []
    for container in _CONTAINERS:
        try:
            children = await vmm.execute("qom-list", {"path": container})
        except VmmRefused as error:
            if error.error_class == "CommandNotFound":
                return ()
            raise
        if not isinstance(children, list) or not all(isinstance(item, dict) for item in children):
            raise QmpProtocolError("qom-list returned no list of properties")
        paths += [
            f"{container}/{item.get('name')}"
            for item in children
            if item.get("type") == f"child<{DRIVER}>"
        ]
    if len(paths) > MAX_FUNCTIONS:
        raise VmmNotReady(f"the VMM has more than {MAX_FUNCTIONS} {DRIVER} devices")
    return tuple(paths)


async def _locate(vmm: Vmm, path: str, buses: Any) -> tuple[int, int, str]:
    """(bus, device and function, host bridge's path) of the device at the QOM path `path`."""
    way, host = await way_to(vmm, path)
    devfn, *bridges = way
    bus = 0
    for bridge in reversed(bridges):
        bus = _secondary_bus(buses, bus, bridge)
    return bus, devfn, host


async def way_to(vmm: Vmm, path: str) -> tuple[list[int], str]:
    """The device and function of the device at the QOM path `path` and of each bridge on the way
    down to the root bus, and the host bridge's path."""
    way: list[int] = []
    while path.startswith(_CONTAINERS):
        if len(way) > _MAX_BRIDGES:
            raise VmmNotReady(f"{path} lies behind more than {_MAX_BRIDGES} bridges")
        way.append(_devfn(await vmm.execute("qom-get", {"path": path, "property": "addr"})))
        parent = await vmm.execute("qom-get", {"path": path, "property": "parent_bus"})
        path = str(parent).rpartition("/")[0]
    return way, path


async def _ecam(vmm: Vmm, host: str) -> int | None:
    """The physical address at which the host bridge maps configuration; None if it does not."""
    try:
        base = await vmm.execute("qom-get", {"path": host, "property": "MCFG"})
    except VmmRefused:
        return None
    return base if type(base) is int and 0 <= base < _ECAM_UNMAPPED else None


def _devfn(address: Any) -> int:
    """Device and function from an address: a number, in older QEMUs `slot.function`."""
    match = _ADDRESS.match(str(address)) if isinstance(address, str) else None
    value = int(match["slot"], 16) << 3 | int(match["function"]) if match else address
    if type(value) is not int or not 0 <= value < 256:
        raise QmpProtocolError(f"a device's address on its bus is {address!r}")
    return value


def _secondary_bus(buses: Any, bus: int, devfn: int) -> int:
    """The bus behind the bridge at `devfn` on `bus`, as `query-pci` tells it."""
    try:
        pending: list[Mapping[str, Any]] = [item for root in buses for item in root["devices"]]
        while pending:
            device = pending.pop()
            bridge = device.get("pci_bridge")
            if bridge is None:
                continue
            if (device["bus"], device["slot"] << 3 | device["function"]) == (bus, devfn):
                number = bridge["bus"]["secondary"]
                if type(number) is int and 0 < number < 256:
                    return number
                break
            pending += bridge.get("devices", [])
    except (KeyError, TypeError, AttributeError) as error:
        raise QmpProtocolError("query-pci returned something malformed") from error
    raise VmmNotReady(
        f"the guest has not numbered the bus behind the bridge at {bus:02x}:{devfn >> 3:02x}: "
        "migrate it when it has booted"
    )
