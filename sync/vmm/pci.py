"""Moves what QEMU itself knows of its vfio-user devices: PCI configuration, MSI-X table, INTx.

QEMU emulates these in part, and its own stream leaves them out: without them the guest arrives with
BARs that are not mapped and interrupts that go nowhere. Owned here: which functions there are, the
accesses and their order. Not owned: the device's own state, and the bytes (`platform_state`).

    source                                       target
    attach, locate   while the guest runs        attach    before there is a guest
    peek             while the guest runs
                                                 restore   before the stream
    read             paused, its devices run
    save             paused, its devices stopped
                                                 restore   loaded and paused

Configuration is accessed by CF8 and CFC (PCI Local Bus Specification 3.0, 3.2.2.3.2), which every
x86 machine has and which reach every bus. A running guest uses them, too: so only while it is
paused, and CF8 is put back. Before, it is read by ECAM (PCI Express Base Specification 3.0, 7.2.2)
if the machine has it, so that little is left to do then: what is restored before the stream
survives it, unless it lies behind a bridge. What is above 255 is the device's.

Each place is compared with what QEMU says of it (`query-pci`) and with what the gateways know of
their devices: at a wrong place another device's configuration would be saved and written.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sync.pci import (
    BAR0,
    CACHE_LINE,
    COMMAND,
    CONFIG_BYTES,
    INTERRUPT_LINE,
    MSI_CAPABILITY,
    MSIX_CAPABILITY,
    ROM,
    Identity,
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
_NAMED, _UNNAMED = "/machine/peripheral", "/machine/peripheral-anon"
_CONTAINERS = (_NAMED, _UNNAMED)
_EXPANDER_HOSTS = ("pxb-host", "pxb-cxl-host")
_EXPANDERS = ("child<pxb>", "child<pxb-pcie>", "child<pxb-cxl>")
"""Devices that bring a root bus of their own, with the number `bus_nr`; and their host bridges."""
_MAX_BRIDGES = 16
"""At most so many lie on the way to a device; a guest numbers at most 256 buses."""
_ECAM_UNMAPPED = (1 << 64) - 1
_REFUSED = b"\xff" * 4
_ECAM_READ_BYTES = 16
"""In one go: QEMU asks the device for each 4 of them, and the guest may have to wait."""
_ADDRESS = re.compile(r"(?P<slot>[0-9a-f]{1,2})\.(?P<function>[0-7])\Z")


class Way(NamedTuple):
    """The way from a device down to its root bus."""

    devfns: list[int]
    """Device and function of the device, then of each bridge."""
    root_bus: int
    """The number of the root bus."""
    host: str
    """The QOM path of the host bridge."""


class PciPlatform:
    """The vfio-user functions of one QEMU. `paths` are their QOM paths."""

    def __init__(self, vmm: Vmm, qtest: Qtest, paths: tuple[str, ...]) -> None:
        self._vmm = vmm
        self._qtest = qtest
        self._paths = paths
        self._functions: tuple[tuple[int, int], ...] = ()
        self._known: dict[tuple[int, int], bytes] = {}
        self._configs: dict[tuple[int, int], bytes] | None = None
        self._cf8 = 0
        self._ways: dict[str, Way] = {}
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

    async def locate(self, identities: Sequence[Identity] = ()) -> None:
        """Finds out what does not change any more, so that `save` need not. The guest has numbered
        its buses: it is past its firmware. Raises `VmmNotReady` if it is not.

        `identities` are those of the gateways' devices. Raises `PlatformError` if another device is
        where one of them should be.
        """
        inventory = _inventory(await self._vmm.execute("query-pci"))
        hosts = {}
        expected = list(identities)
        for path in self._paths:
            way = await self._way(path)
            where = _locate(inventory, way)
            _check_entry(path, where, inventory.get(where))
            hosts[where] = way.host
            seen = _identity_of(inventory[where])
            base = await _ecam(self._vmm, way.host)
            if base is not None:
                address = base + (where[0] << 20 | where[1] << 12)
                config = await self._read(address, CONFIG_BYTES)
                _check_read(where, config)
                self._known[where] = config
                seen = Identity.from_config_space(config)
            if identities:
                _take(expected, where, seen, precise=base is not None)
        if len(hosts) != len(self._paths):
            raise PlatformError(f"two {DRIVER} devices seem to be in one place: {sorted(hosts)}")
        self._functions = tuple(sorted(hosts))

    async def _way(self, path: str) -> Way:
        if path not in self._ways:
            self._ways[path] = await way_to(self._vmm, path)
        return self._ways[path]

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

    async def read(self) -> None:
        """Reads what may have changed in the configuration. The guest is paused, its devices are
        not stopped yet: one that is, need not answer (linux/vfio.h, VFIO_DEVICE_STATE_STOP_COPY).

        Raises `PlatformError` if a device does not answer now.
        """
        if not self._functions:
            await self.locate()
        await self._vmm.settle()
        commands = [port_read(_CF8, 4)]
        for bus, devfn in self._functions:
            commands += _config_reads(bus, devfn, self._unknown((bus, devfn)))
        self._cf8, *values = _values(commands, await self._qtest.run(commands))
        await self._qtest.run([port_write(_CF8, 4, self._cf8)])
        self._configs = {}
        for where in self._functions:
            offsets = self._unknown(where)
            config = _filled(self._known.get(where, bytes(CONFIG_BYTES)), offsets, values)
            del values[: len(offsets)]
            _check_read(where, config)
            self._configs[where] = config

    async def save(self) -> bytes:
        """What `restore` needs on the target, after `read`. The guest is paused and its devices are
        stopped.

        INTx lines are deasserted: one that is asserted now would stay so on the target for good.
        """
        if self._configs is None:
            await self.read()
        assert self._configs is not None
        await self._vmm.settle()
        commands: list[str] = []
        reads: dict[tuple[int, int], int] = {}
        functions = []
        for (bus, devfn), config in self._configs.items():
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
        return Platform(self._cf8, len(self._paths), tuple(changed)).pack()

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
        if platform.functions:
            await self._check_places(platform)
        return platform, [await self._check(function) for function in platform.functions]

    async def _check_places(self, platform: Platform) -> None:
        """Raises `PlatformError` where the source has a device and none of ours is. Buses behind
        bridges have their numbers once the stream is loaded."""
        inventory = _inventory(await self._vmm.execute("query-pci"))
        ours = set()
        for path in self._paths:
            way = await self._way(path)
            with contextlib.suppress(VmmNotReady):
                ours.add(_locate(inventory, way))
        for function in platform.functions:
            if (function.bus, function.devfn) not in ours:
                raise PlatformError(
                    f"the source's VMM has a {DRIVER} at {function.name}, the one here has "
                    f"{', '.join(_name(place) for place in sorted(ours)) or 'none'}: start both "
                    "with the same devices in the same places"
                )

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
    try:
        paths = await _children(vmm, f"child<{DRIVER}>")
    except VmmRefused as error:
        if error.error_class == "CommandNotFound":
            return ()
        raise
    if len(paths) > MAX_FUNCTIONS:
        raise VmmNotReady(f"the VMM has more than {MAX_FUNCTIONS} {DRIVER} devices")
    return tuple(paths)


async def _children(vmm: Vmm, *kinds: str) -> list[str]:
    """The QOM paths of the devices of these kinds."""
    paths = []
    for container in _CONTAINERS:
        children = await vmm.execute("qom-list", {"path": container})
        if not isinstance(children, list) or not all(isinstance(item, dict) for item in children):
            raise QmpProtocolError("qom-list returned no list of properties")
        paths += [f"{container}/{c.get('name')}" for c in children if c.get("type") in kinds]
    return paths


def _locate(inventory: Mapping[tuple[int, int], Any], way: Way) -> tuple[int, int]:
    """(bus, device and function) of the device at the end of `way`."""
    devfn, *bridges = way.devfns
    bus = way.root_bus
    for bridge in reversed(bridges):
        bus = _secondary_bus(inventory, bus, bridge)
    return bus, devfn


async def way_to(vmm: Vmm, path: str) -> Way:
    """The way from the device at the QOM path `path` to its root bus.

    Bridges that QEMU has added by itself are on it, too (`pxb` has one).
    """
    devfns: list[int] = []
    buses: list[str] = []
    place = path
    while True:
        try:
            address = await vmm.execute("qom-get", {"path": place, "property": "addr"})
        except VmmRefused:
            break  # no device on a PCI bus: the host bridge
        if len(devfns) > _MAX_BRIDGES:
            raise VmmNotReady(f"{path} lies behind more than {_MAX_BRIDGES} bridges")
        devfns.append(_devfn(address))
        parent = await vmm.execute("qom-get", {"path": place, "property": "parent_bus"})
        place, _, bus = str(parent).rpartition("/")
        buses.append(bus)
    if not devfns:
        raise VmmNotReady(f"the VMM does not tell on which bus {path} is")
    return Way(devfns, await _root_bus(vmm, place, buses), place)


async def _root_bus(vmm: Vmm, host: str, buses: Sequence[str]) -> int:
    """The number of the root bus of the host bridge at `host`. `buses`: the names of those on the
    way there; an expander's own, or the one of the bridge it brings, has its name."""
    if await vmm.execute("qom-get", {"path": host, "property": "type"}) not in _EXPANDER_HOSTS:
        return 0
    for expander in await _children(vmm, *_EXPANDERS):
        if expander.startswith(f"{_NAMED}/") and expander.rpartition("/")[2] in buses:
            number = await vmm.execute("qom-get", {"path": expander, "property": "bus_nr"})
            if type(number) is int and 0 <= number < 256:
                return number
            raise QmpProtocolError(f"the number of the root bus {expander} is {number!r}")
    raise VmmNotReady(
        f"the VMM does not tell the number of the root bus {buses[-1]}: give its pxb device an id"
    )


def _inventory(buses: Any) -> dict[tuple[int, int], Mapping[str, Any]]:
    """What `query-pci` tells of each function, by (bus, device and function)."""
    found = {}
    try:
        pending: list[Mapping[str, Any]] = [item for root in buses for item in root["devices"]]
        while pending:
            device = pending.pop()
            found[device["bus"], device["slot"] << 3 | device["function"]] = device
            pending += device.get("pci_bridge", {}).get("devices", [])
    except (KeyError, TypeError, AttributeError) as error:
        raise QmpProtocolError("query-pci returned something malformed") from error
    return found


def _identity_of(entry: Mapping[str, Any]) -> Identity:
    """As far as `query-pci` tells it: there is no revision and no programming interface."""
    try:
        ids, class_code = entry["id"], entry["class_info"]["class"]
        return Identity(
            vendor=ids["vendor"],
            device=ids["device"],
            subsystem_vendor=ids.get("subsystem-vendor", 0),
            subsystem=ids.get("subsystem", 0),
            revision=0,
            class_code=class_code << 8,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise QmpProtocolError("query-pci returned something malformed") from error


def _check_entry(path: str, where: tuple[int, int], entry: Mapping[str, Any] | None) -> None:
    """Raises `PlatformError` if QEMU has something else than the device `path` at `where`."""
    container, _, name = path.rpartition("/")
    if entry is None:
        raise PlatformError(f"query-pci shows nothing at {_name(where)}, where {path} should be")
    if entry.get("qdev_id") != (name if container == _NAMED else ""):
        raise PlatformError(
            f"{path} should be at {_name(where)}, query-pci shows "
            f"{entry.get('qdev_id') or 'another device'} there: this topology cannot be migrated"
        )


def _check_read(where: tuple[int, int], config: bytes) -> None:
    """Raises `PlatformError` for what QEMU returns if the device has refused the access."""
    if config[:4] == _REFUSED or config[COMMAND : COMMAND + 4] == _REFUSED:
        raise PlatformError(
            f"the configuration of the device at {_name(where)} cannot be read: it refuses the "
            "access, or there is no device"
        )


def _take(
    expected: list[Identity], where: tuple[int, int], seen: Identity, *, precise: bool
) -> None:
    """Removes from `expected` the device that was seen at `where`. Raises `PlatformError` if it is
    none of them."""
    for identity in expected:
        known = identity
        if not precise:
            known = replace(identity, revision=0, class_code=identity.class_code & 0xFFFF00)
        if known == seen:
            expected.remove(identity)
            return
    raise PlatformError(
        f"the VMM has {_ids(seen)} at {_name(where)}, the gateways have "
        f"{', '.join(map(_ids, expected)) or 'no more devices'}: name the gateways of this VMM"
    )


def _ids(identity: Identity) -> str:
    return (
        f"{identity.vendor:04x}:{identity.device:04x} (subsystem {identity.subsystem_vendor:04x}:"
        f"{identity.subsystem:04x}, revision {identity.revision:02x}, class "
        f"{identity.class_code:06x})"
    )


def _name(where: tuple[int, int]) -> str:
    return f"{where[0]:02x}:{where[1] >> 3:02x}.{where[1] & 7}"


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


def _secondary_bus(inventory: Mapping[tuple[int, int], Any], bus: int, devfn: int) -> int:
    """The bus behind the bridge at `devfn` on `bus`."""
    bridge = inventory.get((bus, devfn), {}).get("pci_bridge")
    if bridge is not None:
        try:
            number = bridge["bus"]["secondary"]
        except (KeyError, TypeError) as error:
            raise QmpProtocolError("query-pci returned something malformed") from error
        if type(number) is int and 0 < number < 256:
            return number
    raise VmmNotReady(
        f"the guest has not numbered the bus behind the bridge at {bus:02x}:{devfn >> 3:02x}: "
        "migrate it when it has booted"
    )
