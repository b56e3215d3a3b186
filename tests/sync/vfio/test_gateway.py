"""The gateway with a function of the host in place of a device process: a guest moves from one
gateway to another by the requests that `send` and `receive` make."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from ferry.migration.devices import view_of
from lab.vfio_user.client import Client as Vmm
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.loop import Gateway, GatewayOptions
from sync.registers.choose import source_for, target_for
from sync.vfio.device import VfioDevice
from sync.vfio.endpoint import HostEndpoint
from sync.vfio.errors import NoFunction
from sync.vfio.sysfs import PciFunction
from sync.vfio_user.protocol import DmaMap, IrqSet, SetIrqs
from tests.sync.queues.world import GUEST_IOVA, Driver, DriverCq, DriverSq
from tests.sync.vfio.fake_kernel import FakeSysfs
from tests.sync.vfio.model_kernel import ModelKernel
from tests.sync.vfio.test_endpoint import ADDRESS, CONFIG, MSIX, RAM_BYTES, Ram


class Host:
    """A host with one function and a gateway that serves it."""

    def __init__(self, folder: Path, kernel: ModelKernel, functions: dict[str, "Host"]) -> None:
        folder.mkdir()
        FakeSysfs(folder / "sys").add(ADDRESS, driver="vfio-pci", group="7")
        self.folder = folder
        self.kernel = kernel
        self.events: list[str] = []
        self.seen = threading.Condition()
        functions[str(folder)] = self
        options = GatewayOptions(
            folder / "vmm", None, folder / "control", host_function=str(folder)
        )
        self.gateway = Gateway(options, self.log)
        self.thread = threading.Thread(target=self.gateway.run)
        self.thread.start()
        self.vmm = Vmm(folder / "vmm")

    def open(self, log: Callable[..., None]) -> HostEndpoint:
        return HostEndpoint(VfioDevice(PciFunction(ADDRESS, self.folder / "sys"), self.kernel), log)

    def log(self, event: str, **fields: object) -> None:
        with self.seen:
            self.events.append(event)
            self.seen.notify_all()

    def wait(self, event: str) -> None:
        with self.seen:
            assert self.seen.wait_for(lambda: event in self.events, 20)

    def start_guest(self, ram: Ram, lines: list[int]) -> None:
        """What a VMM does when its guest has enabled the device."""
        self.vmm.dma_map(DmaMap(3, 0, GUEST_IOVA, RAM_BYTES), ram.fd)
        self.vmm.region_write(CONFIG, 4, b"\x06\x00")
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self.vmm.set_irqs(SetIrqs(flags, MSIX, 0, len(lines)), lines)

    def close(self) -> None:
        self.vmm.close()
        self.gateway.stop()
        self.thread.join(20)
        assert not self.kernel.opened


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Host, Host]]:
    functions: dict[str, Host] = {}

    def open_endpoint(address: str, log: Callable[..., None]) -> HostEndpoint:
        return functions[address].open(log)

    monkeypatch.setattr("sync.vfio.endpoint.open_endpoint", open_endpoint)
    blocks: dict[int, bytes] = {}
    with (
        _closing(Host(tmp_path / "a", ModelKernel(blocks, 1), functions)) as source,
        _closing(Host(tmp_path / "b", ModelKernel(blocks, 2), functions)) as target,
    ):
        yield source, target


@contextmanager
def _closing(host: Host) -> Iterator[Host]:
    try:
        yield host
    finally:
        host.close()


def test_a_guest_moves_by_the_method_v2_and_its_pages_by_the_log(
    hosts: tuple[Host, Host],
) -> None:
    source, target = hosts
    ram = Ram()
    lines = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    source.start_guest(ram, lines)
    here = [source]
    driver = Driver(ram, lambda offset, data: here[0].vmm.region_write(0, offset, data))  # type: ignore[arg-type]
    rng = random.Random(1)
    driver.enable(8, 8)
    driver.cqs[1] = DriverCq(1, ram.allocate(4096), 16)
    driver.sqs[1] = DriverSq(1, ram.allocate(4096), 16, driver.cqs[1])

    def admin(opcode: int, prp1: int, number: int) -> None:
        driver.submit(driver.sqs[0], opcode, prp1=prp1, dwords=(15 << 16 | 1, number))
        assert driver.take(driver.cqs[0]) == 1

    def work(count: int) -> None:
        for _ in range(count):
            driver.read_or_write(driver.sqs[1], rng)
            assert driver.take(driver.cqs[1]) == 1

    admin(0x05, driver.cqs[1].base, 1 << 16 | 3)
    admin(0x01, driver.sqs[1].base, 1 << 16 | 1)
    driver.submit(driver.sqs[0], 0x0C)
    work(21)

    async def migrate() -> None:
        a = await GatewayClient.connect(
            source.folder / "control", role=ClientRole.SOURCE, session="s"
        )
        b = await GatewayClient.connect(
            target.folder / "control", role=ClientRole.TARGET, session="s"
        )
        async with a, b:
            info, there = await a.status(), await b.status()
            assert (
                info.supports.v2 and info.supports.logging and info.identity.class_code == 0x010802
            )
            registers = source_for(view_of(info), a, ())
            replica = target_for(await registers.offer(), view_of(there), b, ())
            await b.standby("s")
            mediation = await a.mediate(tracker="logging", page_size=4096, capture=False)
            assert mediation.n_pages == RAM_BYTES // 4096
            async for payload in registers.begin(mediation.values, mediation.journal_seq):
                await replica.receive(payload)
            await trio.to_thread.run_sync(work, 5)
            assert (await a.dirty()).complete
            await registers.quiesce()
            await a.stop(fence=registers.fence, resume=registers.resume_records())
            async for payload in registers.final():
                await replica.receive(payload)
            await replica.finish()
            await a.release("s")
            await b.own("s")
            await trio.to_thread.run_sync(target.start_guest, ram, lines)
            await b.start(replica.start_records())
            for descriptor in mediation.dirty:
                os.close(descriptor)

    trio.run(migrate)
    here[0] = target
    work(40)
    assert len(target.kernel.controller.events) == 1
    assert not target.kernel.controller.bad_status


def test_a_gateway_goes_on_when_its_vmm_went(hosts: tuple[Host, Host]) -> None:
    source, _ = hosts
    source.vmm.region_read(0, 0, 8)
    resets = source.kernel.resets
    source.vmm.close()
    source.wait("vmm-lost")
    source.vmm = Vmm(source.folder / "vmm")
    assert source.vmm.region_read(0, 8, 4) == b"\0\0\2\0"
    assert source.kernel.resets > resets


def test_a_function_that_cannot_be_opened_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(address: str, log: Callable[..., None]) -> HostEndpoint:
        raise NoFunction(f"there is no {address}")

    monkeypatch.setattr("sync.vfio.endpoint.open_endpoint", refused)
    events: list[tuple[str, str]] = []
    told = threading.Event()

    def log(event: str, **fields: object) -> None:
        if event == "device-unusable":
            events.append((event, str(fields["reason"])))
            told.set()

    options = GatewayOptions(tmp_path / "v", None, tmp_path / "c", host_function="0000:01:00.0")
    gateway = Gateway(options, log)
    thread = threading.Thread(target=gateway.run)
    thread.start()
    assert told.wait(20)
    gateway.stop()
    thread.join()
    assert events[0][1] == "there is no 0000:01:00.0"
