"""A machine's devices are saved and restored, against a model of the machine behind qtest."""

import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio

from sync.pci import Identity
from sync.vmm.errors import QmpProtocolError, VmmNotReady, VmmRefused
from sync.vmm.pci import PciPlatform
from sync.vmm.platform_state import Platform, PlatformError

BAR, TABLE_BAR, VECTORS = 0xFE80_0000, 0xFE80_4000, 3
ECAM = 0xB000_0000


@dataclass
class Function:
    """A function with one BAR of registers and one with an MSI-X table, as QEMU emulates it."""

    config: bytearray = field(default_factory=lambda: bytearray(256))
    table: bytearray = field(default_factory=lambda: bytearray(16 * VECTORS))
    table_when_enabled: bytes = b""
    register_reads: int = 0

    def __post_init__(self) -> None:
        self.put(0, 0x1042_1AF4.to_bytes(4, "little"))
        self.put(0x06, b"\x10")
        self.put(0x34, b"\x40")
        self.put(0x3D, b"\x01")
        self.put(0x40, bytes([0x11, 0, VECTORS - 1, 0, 1, 0, 0, 0]))

    def put(self, at: int, data: bytes) -> None:
        self.config[at : at + len(data)] = data
        if at == 0x42 and data[1] & 0x80:
            self.table_when_enabled = bytes(self.table)

    def place(self, bar: int) -> int:
        decodes = self.config[4] & 2
        at = int.from_bytes(self.config[0x10 + 4 * bar : 0x14 + 4 * bar], "little")
        return at if decodes else 0

    def configure(self, *, msix: bool) -> None:
        """As a driver leaves it."""
        self.put(0x10, BAR.to_bytes(4, "little"))
        self.put(0x14, TABLE_BAR.to_bytes(4, "little"))
        self.put(0x0C, b"\x10\x20")
        self.put(0x3C, b"\x0a")
        self.put(0x04, b"\x06\x04" if msix else b"\x06\x00")
        self.table[:] = bytes(range(16 * VECTORS))
        if msix:
            self.put(0x42, bytes([VECTORS - 1, 0x80]))


class Machine:
    """What `Vmm.execute` and qtest show of a QEMU; `functions` by (bus, devfn)."""

    def __init__(
        self, *, ecam: bool = True, root_port: bool = False, expander: str | None = None
    ) -> None:
        """`expander`: the type of a device with a root bus of its own, which the root port (or,
        for `pxb`, the bridge that QEMU adds) is on."""
        root_port = root_port or expander is not None
        self.function = Function()
        self.where = (3, 0) if root_port else (0, 0x20)
        self.root_port = root_port
        self.expander = expander
        self.expander_id = "pxb1"
        self.qdev_id = ""
        self.stopped = False
        """The device refuses every access; QEMU returns ones for it."""
        self.ecam = ecam
        self.cf8 = 0x8000_0004
        self.chardev: str | None = None
        self.objects: list[str] = []
        self.is_qemu = True
        self.has_device = True
        self.malformed: dict[str, Any] = {}
        self.path = ""

    async def execute(self, command: str, arguments: Any = None) -> Any:
        if not self.is_qemu:
            raise VmmRefused(command, "CommandNotFound", "no such command")
        if command in self.malformed:
            return self.malformed[command]
        return getattr(self, command.replace("-", "_"))(**(arguments or {}))

    async def settle(self) -> None:
        """Nothing is pending here."""

    def query_chardev(self) -> Any:
        found = [{"label": "console", "filename": "file", "frontend-open": True}]
        if self.chardev:
            name = f"disconnected:unix:{self.chardev},server=on"
            found.append({"label": "vfio-ferry", "filename": name, "frontend-open": True})
        return found

    def chardev_add(self, id: str, backend: Any) -> Any:
        assert (id, self.chardev) == ("vfio-ferry", None)
        self.chardev = backend["data"]["addr"]["data"]["path"]
        return {}

    def object_add(self, **options: Any) -> Any:
        assert not self.objects, "QEMU takes one qtest object"
        assert options.pop("qom-type") == "qtest"
        self.objects.append(options["id"])
        return {}

    def qom_list(self, path: str) -> Any:
        if path == "/objects":
            return [{"name": name, "type": "child<qtest>"} for name in self.objects]
        found = [{"name": "type", "type": "string"}, {"name": "d1", "type": "child<e1000>"}]
        if path == "/machine/peripheral" and self.expander:
            found.append({"name": self.expander_id, "type": f"child<{self.expander}>"})
        if path == "/machine/peripheral-anon" and self.has_device:
            found.append({"name": "device[0]", "type": "child<vfio-user-pci>"})
        return found

    def qom_get(self, path: str, property: str) -> Any:
        if property == "MCFG":
            if not self.ecam:
                raise VmmRefused("qom-get", "GenericError", "Property not found")
            return ECAM
        device = "/machine/peripheral-anon/device[0]"
        main = {"type": "q35-pcihost"}
        known: dict[str, dict[str, Any]] = {"/machine/q35": main}
        bus = "/machine/q35/pcie.0"
        if self.expander == "pxb":
            known["/machine/unattached/device[22]"] = {"type": "pxb-host"}
            port = "/machine/unattached/device[23]"
            known[port] = {"addr": 0, "parent_bus": "/machine/unattached/device[22]/pxb-internal"}
            bus = f"{port}/{self.expander_id}"
        elif self.root_port:
            port = "/machine/peripheral/port"
            known[port] = {"addr": "05.0", "parent_bus": bus}
            if self.expander:
                known["/machine/unattached/device[22]"] = {"type": "pxb-host"}
                known[port]["parent_bus"] = f"/machine/unattached/device[22]/{self.expander_id}"
            bus = f"{port}/port"
        known[device] = {"addr": self.where[1], "parent_bus": bus}
        known[f"/machine/peripheral/{self.expander_id}"] = {"bus_nr": 0x80}
        try:
            return known[path][property]
        except KeyError:
            raise VmmRefused("qom-get", "GenericError", "Property not found") from None

    def query_pci(self) -> Any:
        def entry(bus: int, slot: int, **more: Any) -> dict[str, Any]:
            ids = {"vendor": 0x1B36, "device": 0xC}
            told = {"qdev_id": "", "id": ids, "class_info": {"class": 0x604}}
            return {"bus": bus, "slot": slot, "function": 0, **told, **more}

        config = self.function.config
        ids = [int.from_bytes(config[at : at + 2], "little") for at in (0, 2, 0x2C, 0x2E, 0xA)]
        names = ("vendor", "device", "subsystem-vendor", "subsystem")
        device = entry(
            self.where[0],
            self.where[1] >> 3,
            qdev_id=self.qdev_id,
            id=dict(zip(names, ids[:4], strict=True)),
            class_info={"class": ids[4]},
        )
        main = [entry(0, 0)]
        if not self.root_port:
            return [{"bus": 0, "devices": [*main, device]}]
        root = 0x80 if self.expander else 0
        numbers = {"number": 0, "secondary": 3, "subordinate": 3}
        bridge = {"bus": numbers, "devices": [device]}
        port = entry(root, 0 if self.expander == "pxb" else 5, qdev_id="port", pci_bridge=bridge)
        if not self.expander:
            return [{"bus": 0, "devices": [*main, port]}]
        # What a walk that takes every root bus for bus 0 comes to.
        decoy = {"bus": {**numbers, "secondary": 4}, "devices": []}
        main.append(entry(0, port["slot"], pci_bridge=decoy))
        return [{"bus": 0x80, "devices": [port]}, {"bus": 0, "devices": main}]

    async def serve(self, stream: trio.SocketStream) -> None:
        buffer = b""
        async for data in stream:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                await stream.send_all(self.answer(line.decode().split()) + b"\n")

    def answer(self, words: list[str]) -> bytes:
        command, numbers = words[0], [int(word, 0) for word in words[1:3]]
        if command in ("inl", "outl", "outw", "outb"):
            size = {"l": 4, "w": 2, "b": 1}[command[-1]]
            return self.port(numbers[0], size, numbers[1] if command[0] == "o" else None)
        at, size = numbers
        if command == "read":
            return b"OK 0x" + self.read(at, size).hex().encode()
        assert at == self.function.place(1)
        self.function.table[:] = bytes.fromhex(words[3][2:])
        return b"OK"

    def read(self, at: int, size: int) -> bytes:
        function = self.function
        if at == function.place(1):
            return bytes(function.table[:size])
        if at == function.place(0):
            function.register_reads += 1
            return bytes(size)
        start = at - ECAM - (self.where[0] << 20 | self.where[1] << 12)
        assert 0 <= start <= 256 - size
        return bytes(function.config[start : start + size])

    def port(self, port: int, size: int, value: int | None) -> bytes:
        if port == 0xCF8:
            if value is None:
                return b"OK 0x%04x" % self.cf8
            self.cf8 = value
            return b"OK"
        bus, devfn, at = self.cf8 >> 16 & 0xFF, self.cf8 >> 8 & 0xFF, self.cf8 & 0xFC
        there = (bus, devfn) == self.where and not self.stopped
        config = self.function.config if there else bytearray(b"\xff" * 256)
        at += port - 0xCFC
        if value is None:
            return b"OK 0x%04x" % int.from_bytes(config[at : at + size], "little")
        assert (bus, devfn) == self.where
        self.function.put(at, value.to_bytes(size, "little"))
        return b"OK"


@asynccontextmanager
async def served(*machines: Machine) -> AsyncIterator[None]:
    """Each machine with its qtest socket beside its QMP socket `machine.path`."""
    with tempfile.TemporaryDirectory(prefix="qt-") as folder:
        async with trio.open_nursery() as nursery:
            for number, machine in enumerate(machines):
                machine.path = f"{folder}/{number}"
                listener = trio.socket.socket(trio.socket.AF_UNIX)
                await listener.bind(machine.path + ".qtest")
                listener.listen(4)
                listeners = [trio.SocketListener(listener)]
                nursery.start_soon(trio.serve_listeners, machine.serve, listeners)
            yield
            nursery.cancel_scope.cancel()


def run(body: Callable[..., Awaitable[None]], *machines: Machine) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            async with served(*machines):
                await body(*machines)

    trio.run(main)


def vmm(machine: Machine) -> Any:
    return machine


async def save_platform(vmm: Any, qmp_path: str) -> bytes:
    """`PciPlatform.save` in one go; empty where there is nothing to save."""
    platform = await PciPlatform.attach(vmm, qmp_path)
    if platform is None:
        return b""
    try:
        return await platform.save()
    finally:
        await platform.aclose()


async def restore_platform(vmm: Any, qmp_path: str, blob: bytes) -> None:
    platform = await PciPlatform.attach(vmm, qmp_path)
    assert platform is not None
    try:
        await platform.restore(blob)
    finally:
        await platform.aclose()


@pytest.mark.parametrize("ecam", [True, False])
@pytest.mark.parametrize("place", ["root bus", "root port", "pxb-pcie", "pxb"])
@pytest.mark.parametrize("msix", [True, False])
def test_the_target_gets_what_the_source_had(ecam: bool, place: str, msix: bool) -> None:
    """Root buses have numbers of their own, and QEMU adds bridges by itself."""
    expander = place if place.startswith("pxb") else None
    source, target = (
        Machine(ecam=ecam, root_port=place == "root port", expander=expander) for _ in range(2)
    )
    source.function.configure(msix=msix)
    target.cf8 = 0

    async def body(source: Machine, target: Machine) -> None:
        blob = await save_platform(vmm(source), source.path)
        assert source.function.register_reads == (0 if msix else 1)
        await restore_platform(vmm(target), target.path, blob)

    run(body, source, target)
    assert target.function.config == source.function.config
    assert target.function.table == source.function.table
    assert target.cf8 == source.cf8 == 0x8000_0004
    assert target.function.table_when_enabled == (bytes(source.function.table) if msix else b"")


def test_what_changes_after_locate_is_saved() -> None:
    source, target = Machine(), Machine()
    source.function.configure(msix=False)

    async def body(source: Machine, target: Machine) -> None:
        platform = await PciPlatform.attach(vmm(source), source.path)
        assert platform is not None
        await platform.locate()
        source.function.configure(msix=True)
        await restore_platform(vmm(target), target.path, await platform.save())
        await platform.aclose()

    run(body, source, target)
    assert target.function.config == source.function.config


@pytest.mark.parametrize("changed", [False, True])
def test_what_is_restored_before_the_stream_is_not_saved_again(changed: bool) -> None:
    source, target = Machine(), Machine()
    source.function.configure(msix=True)

    async def body(source: Machine, target: Machine) -> None:
        platform = await PciPlatform.attach(vmm(source), source.path)
        assert platform is not None
        await platform.locate()
        early = await platform.peek()
        assert source.cf8 == 0x8000_0004
        await restore_platform(vmm(target), target.path, early)
        assert target.function.config == source.function.config
        if changed:
            source.function.table[4] ^= 1
        late = Platform.unpack(await platform.save())
        assert len(late.functions) == int(changed)
        assert late.n_devices == 1
        await restore_platform(vmm(target), target.path, late.pack())
        await platform.aclose()

    run(body, source, target)
    assert target.function.config == source.function.config
    assert target.function.table == source.function.table
    assert target.cf8 == source.cf8


@pytest.mark.parametrize("ecam", [True, False])
def test_what_cannot_be_reached_before_the_stream_is_left_for_later(ecam: bool) -> None:
    """Behind a bridge, since the bus has no number yet on the target; or without ECAM."""

    async def body(machine: Machine) -> None:
        platform = await PciPlatform.attach(vmm(machine), machine.path)
        assert platform is not None
        await platform.locate()
        assert Platform.unpack(await platform.peek()).functions == ()
        assert len(Platform.unpack(await platform.save()).functions) == 1
        await platform.aclose()

    run(body, Machine(root_port=ecam, ecam=ecam))


def test_the_qtest_object_of_an_earlier_migration_is_used_again() -> None:
    async def body(machine: Machine) -> None:
        first = await save_platform(vmm(machine), machine.path)
        assert await save_platform(vmm(machine), "/elsewhere") == first

    run(body, Machine())


def test_another_vmm_has_nothing_to_save() -> None:
    async def body(machine: Machine) -> None:
        machine.is_qemu = False
        assert await save_platform(vmm(machine), machine.path) == b""

    run(body, Machine())


@pytest.mark.parametrize("change", ["ids", "vectors", "place"])
def test_another_device_is_refused_before_anything_is_written(change: str) -> None:
    source, target = Machine(), Machine()
    source.function.configure(msix=True)
    if change == "ids":
        target.function.put(0, b"\x86\x80")
    elif change == "vectors":
        target.function.put(0x42, b"\x07\x00")
    else:
        target.where = (0, 0x28)
    before = bytes(target.function.config)

    async def body(source: Machine, target: Machine) -> None:
        blob = await save_platform(vmm(source), source.path)
        with pytest.raises(PlatformError):
            await restore_platform(vmm(target), target.path, blob)

    run(body, source, target)
    assert target.function.config == before


def test_a_bus_that_the_guest_has_not_numbered_is_said() -> None:
    machine = Machine(root_port=True)
    pci = machine.query_pci()
    pci[0]["devices"][1]["pci_bridge"] = {"bus": {"secondary": 0}}
    machine.malformed["query-pci"] = pci

    async def body(machine: Machine) -> None:
        with pytest.raises(VmmNotReady, match="when it has booted"):
            await save_platform(vmm(machine), machine.path)

    run(body, machine)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("query-pci", [{"bus": 0}]),
        ("query-pci", 7),
        ("qom-list", {"name": "x"}),
        ("qom-list", ["x"]),
        ("query-chardev", {}),
        ("query-chardev", [1]),
        ("qom-get", {"a": 1}),
        ("qom-get", 4711),
    ],
    ids=json.dumps,
)
def test_i9_answers_that_make_no_sense_are_refused(command: str, answer: Any) -> None:
    machine = Machine(root_port=True)
    machine.malformed[command] = answer

    async def body(machine: Machine) -> None:
        with pytest.raises(QmpProtocolError):
            await save_platform(vmm(machine), machine.path)

    run(body, machine)


def test_a_path_too_long_for_a_socket_is_said() -> None:
    async def body(machine: Machine) -> None:
        with pytest.raises(VmmNotReady, match="at most 101 bytes"):
            await save_platform(vmm(machine), "/" + "x" * 101)

    run(body, Machine())


def test_a_root_bus_whose_number_is_not_told_is_refused_by_name() -> None:
    """QEMU names the bus of an expander without an id after its type."""
    machine = Machine(expander="pxb-pcie")
    machine.expander_id = "other"

    async def body(machine: Machine) -> None:
        platform = await PciPlatform.attach(vmm(machine), machine.path)
        assert platform is not None
        machine.expander_id = "pxb-pcie-bus.0"
        machine.malformed["qom-list"] = []
        with pytest.raises(VmmNotReady, match=r"pxb-pcie-bus\.0: give its pxb device an id"):
            await platform.locate()
        await platform.aclose()

    run(body, machine)


KNOWN = Identity(
    vendor=0x1AF4,
    device=0x1042,
    subsystem_vendor=0x1AF4,
    subsystem=0x1100,
    revision=1,
    class_code=0x018000,
)


@pytest.mark.parametrize("ecam", [True, False])
@pytest.mark.parametrize("wrong", ["", "vendor", "device", "subsystem", "class_code", "revision"])
def test_the_device_in_the_place_is_the_one_that_the_gateway_knows(wrong: str, ecam: bool) -> None:
    machine = Machine(ecam=ecam)
    machine.function.put(0x08, b"\x01\x00\x80\x01")
    machine.function.put(0x2C, b"\xf4\x1a\x00\x11")
    known = replace(KNOWN, **{wrong: 0x77 << 8}) if wrong else KNOWN

    async def body(machine: Machine) -> None:
        platform = await PciPlatform.attach(vmm(machine), machine.path)
        assert platform is not None
        if not wrong or (wrong == "revision" and not ecam):  # `query-pci` does not tell it
            await platform.locate([known])
        else:
            with pytest.raises(PlatformError, match="the gateways have"):
                await platform.locate([known])
        await platform.aclose()

    run(body, machine)


def test_another_device_in_the_place_is_refused() -> None:
    """Whatever the walk came to: `query-pci` has to show the very device there."""
    machine = Machine()
    machine.qdev_id = "somebody"

    async def body(machine: Machine) -> None:
        with pytest.raises(PlatformError, match="shows somebody there"):
            await save_platform(vmm(machine), machine.path)

    run(body, machine)


def test_a_like_device_that_is_not_the_gateways_does_not_pass_at_the_target() -> None:
    """An emulated device with the same ids at the source's place, the gateway's beside it."""
    source, target = Machine(), Machine()
    source.function.configure(msix=True)

    async def body(source: Machine, target: Machine) -> None:
        blob = await save_platform(vmm(source), source.path)
        before = bytes(target.function.config)
        anon = "/machine/peripheral-anon/device[0]"
        real = target.qom_get

        def elsewhere(path: str, property: str) -> Any:
            return 0x30 if (path, property) == (anon, "addr") else real(path, property)

        target.qom_get = elsewhere  # type: ignore[method-assign]
        with pytest.raises(PlatformError, match=r"has 00:06\.0: start both"):
            await restore_platform(vmm(target), target.path, blob)
        assert target.function.config == before

    run(body, source, target)


@pytest.mark.parametrize("ecam", [True, False])
def test_configuration_is_read_before_the_device_stops_and_a_failed_read_is_an_error(
    ecam: bool,
) -> None:
    source, target = Machine(ecam=ecam), Machine(ecam=ecam)
    source.function.configure(msix=True)

    async def body(source: Machine, target: Machine) -> None:
        platform = await PciPlatform.attach(vmm(source), source.path)
        assert platform is not None
        await platform.locate()
        await platform.read()
        source.stopped = True
        blob = await platform.save()
        with pytest.raises(PlatformError, match="cannot be read"):
            await platform.read()
        await platform.aclose()
        await restore_platform(vmm(target), target.path, blob)
        assert target.function.config == source.function.config

    run(body, source, target)
