"""A machine's devices are saved and restored, against a model of the machine behind qtest."""

import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from sync.vmm.errors import QmpProtocolError, VmmNotReady, VmmRefused
from sync.vmm.pci import PciPlatform, restore_platform, save_platform
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

    def __init__(self, *, ecam: bool = True, root_port: bool = False) -> None:
        self.function = Function()
        self.where = (3, 0) if root_port else (0, 0x20)
        self.root_port = root_port
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
        if path == "/machine/peripheral-anon" and self.has_device:
            found.append({"name": "device[0]", "type": "child<vfio-user-pci>"})
        return found

    def qom_get(self, path: str, property: str) -> Any:
        if property == "MCFG":
            if not self.ecam:
                raise VmmRefused("qom-get", "GenericError", "Property not found")
            return ECAM
        if path == "/machine/peripheral/port":
            return {"addr": "05.0", "parent_bus": "/machine/q35/pcie.0"}[property]
        bus = "/machine/peripheral/port/port" if self.root_port else "/machine/q35/pcie.0"
        return {"addr": self.where[1], "parent_bus": bus}[property]

    def query_pci(self) -> Any:
        bridge = {"bus": {"number": 0, "secondary": 3, "subordinate": 3}, "devices": []}
        port = {"bus": 0, "slot": 5, "function": 0, "pci_bridge": bridge}
        return [{"bus": 0, "devices": [{"bus": 0, "slot": 0, "function": 0}, port]}]

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
        config = self.function.config if (bus, devfn) == self.where else bytearray(b"\xff" * 256)
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


@pytest.mark.parametrize("ecam", [True, False])
@pytest.mark.parametrize("root_port", [True, False])
@pytest.mark.parametrize("msix", [True, False])
def test_the_target_gets_what_the_source_had(ecam: bool, root_port: bool, msix: bool) -> None:
    source = Machine(ecam=ecam, root_port=root_port)
    target = Machine(ecam=ecam, root_port=root_port)
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
        await restore_platform(vmm(machine), machine.path, b"")

    run(body, Machine())


@pytest.mark.parametrize("change", ["ids", "vectors", "place", "none"])
def test_another_device_is_refused_before_anything_is_written(change: str) -> None:
    source, target = Machine(), Machine()
    source.function.configure(msix=True)
    if change == "ids":
        target.function.put(0, b"\x86\x80")
    elif change == "vectors":
        target.function.put(0x42, b"\x07\x00")
    elif change == "place":
        target.where = (0, 0x28)
    else:
        target.has_device = False
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
    pci[0]["devices"][1]["pci_bridge"]["bus"]["secondary"] = 0
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
