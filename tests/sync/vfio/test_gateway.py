"""The gateway with a function of the host in place of a device process: a guest moves from one
gateway to another by the requests that `send` and `receive` make."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import pytest
import trio

from ferry.migration.devices import view_of
from lab.devices.disk import Disk
from lab.devices.nvme.controller import NvmeController
from lab.devices.virtio.blk import VirtioBlk
from lab.vfio_user.client import Client as Vmm
from lab.vfio_user.server import Server
from sync.dirty.shared import QueueTracker
from sync.errors import DeviceRefusal
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.core import Limits
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.loop import Gateway, GatewayOptions
from sync.gateway.errors import GatewayError, NewDeviceUnreachable
from sync.registers.choose import source_for, target_for
from sync.registers.errors import IdentityMismatch
from sync.vfio.device import VfioDevice
from sync.vfio.endpoint import HostEndpoint
from sync.vfio.errors import NoFunction
from sync.vfio.sysfs import PciFunction
from sync.vfio_user.errors import Disconnected
from sync.vfio_user.protocol import MigrationState
from tests.sync.dirty.test_trackers import pages_in
from tests.sync.queues.world import GUEST_IOVA
from tests.sync.replacing import replace_device
from tests.sync.vfio.fake_kernel import FakeSysfs
from tests.sync.vfio.model_kernel import ACCESS_PLATFORM, ModelKernel, VirtioKernel
from tests.sync.vfio.moving import (
    Guest,
    VirtioGuest,
    abort_everywhere,
    move,
    move_machine,
)
from tests.sync.vfio.test_endpoint import ADDRESS, RAM_BYTES

K = TypeVar("K", ModelKernel, VirtioKernel)


class Host(Generic[K]):
    """A host with one function and a gateway that serves it."""

    def __init__(self, folder: Path, kernel: K, functions: dict[str, "Host[K]"]) -> None:
        folder.mkdir()
        FakeSysfs(folder / "sys").add(ADDRESS, driver="vfio-pci", group="7")
        self.folder = folder
        self.kernel: K = kernel
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

    def close(self) -> None:
        self.vmm.close()
        self.gateway.stop()
        self.thread.join(20)
        assert not self.kernel.opened


NvmeHost = Host[ModelKernel]
NvmeHosts = tuple[NvmeHost, NvmeHost]


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NvmeHosts]:
    functions: dict[str, NvmeHost] = {}

    def open_endpoint(address: str, log: Callable[..., None]) -> HostEndpoint:
        return functions[address].open(log)

    monkeypatch.setattr("sync.vfio.endpoint.open_endpoint", open_endpoint)
    blocks: dict[int, bytes] = {}
    with (
        _closing(Host(tmp_path / "a", ModelKernel(blocks, 1), functions)) as source,
        _closing(Host(tmp_path / "b", ModelKernel(blocks, 2), functions)) as target,
    ):
        yield source, target


@pytest.fixture
def no_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing happens in a gateway that no event is for."""
    monkeypatch.setattr("sync.gateway.engine.loop.TICK_S", 3600.0)


@contextmanager
def _closing(host: Host[K]) -> Iterator[Host[K]]:
    try:
        yield host
    finally:
        host.close()


def test_a_guest_moves_by_the_method_v2_and_its_pages_by_the_log(
    hosts: NvmeHosts,
) -> None:
    source, target = hosts
    move(source, target)
    assert len(target.kernel.controller.events) == 1
    assert not target.kernel.controller.bad_status


def test_everybody_is_answered_while_a_device_comes_to_rest(
    hosts: NvmeHosts,
) -> None:
    source, _ = hosts
    guest = Guest(source)
    guest.start()
    source.kernel.works = False
    guest.driver.read_or_write(guest.driver.sqs[1], guest.random)

    async def stop() -> None:
        path = source.folder / "control"
        client = await GatewayClient.connect(path, role=ClientRole.SOURCE, session="s")
        observer = await GatewayClient.connect(path, role=ClientRole.OBSERVER)
        async with client, observer, trio.open_nursery() as nursery:
            await client.mediate(tracker="none", page_size=4096, capture=False)
            nursery.start_soon(client.mig_state, MigrationState.STOP_COPY)
            for _ in range(3):
                assert (await observer.status()).device_connected
                await trio.to_thread.run_sync(source.vmm.region_read, 0, 8, 4)
            source.kernel.controller.run()

    trio.run(stop)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_gateway_is_alive_while_a_device_takes_its_time_to_get_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = ModelKernel({})
    kernel.works = False
    FakeSysfs(tmp_path / "sys").add(ADDRESS, driver="vfio-pci", group="7")
    function = PciFunction(ADDRESS, tmp_path / "sys")
    monkeypatch.setattr(
        "sync.vfio.endpoint.open_endpoint",
        lambda address, log: HostEndpoint(VfioDevice(function, kernel), log),
    )
    events: list[str] = []
    beats: list[float] = []

    def has_a_command() -> bool:
        ring = kernel.controller.sqs.get(0)
        return ring is not None and ring.head != ring.tail

    options = GatewayOptions(
        tmp_path / "vmm",
        None,
        tmp_path / "control",
        host_function=ADDRESS,
        limits=Limits(device_deadline_s=0.1),
        heartbeat=beats.append,
    )
    gateway = Gateway(options, lambda event, **fields: events.append(event))
    thread = threading.Thread(target=gateway.run)
    thread.start()
    wait_for(has_a_command)
    seen = len(beats)
    wait_for(lambda: len(beats) > seen + 4)
    kernel.works = True
    kernel.controller.step()
    kernel.controller.step()
    wait_for(lambda: "device-connected" in events)
    gateway.stop()
    thread.join(20)
    assert not kernel.opened


def test_i1_a_scan_finds_no_page_that_the_queues_did_not_name(
    hosts: NvmeHosts,
) -> None:
    source, _ = hosts
    guest = Guest(source)
    guest.start()
    ram, write = guest.ram, guest.ram.write
    by_processors: set[int] = set()

    def noted(iova: int, data: bytes) -> None:
        first = (iova - GUEST_IOVA) // 4096
        by_processors.update(range(first, (iova - GUEST_IOVA + len(data) - 1) // 4096 + 1))
        write(iova, data)

    ram.write = noted  # type: ignore[method-assign]

    async def track() -> None:
        client = await GatewayClient.connect(
            source.folder / "control", role=ClientRole.SOURCE, session="s"
        )
        async with client:
            tracker = QueueTracker(client, RAM_BYTES // 4096)
            await tracker.start(
                await client.mediate(tracker="queues", page_size=4096, capture=False)
            )
            await tracker.collect()
            for _ in range(4):
                before = ram.bytes[:]
                await trio.to_thread.run_sync(guest.work, 9)
                named = pages_in(await tracker.collect())
                scanned = {
                    at // 4096
                    for at in range(0, RAM_BYTES, 4096)
                    if ram.bytes[at : at + 4096] != before[at : at + 4096]
                }
                assert scanned - by_processors <= named
                assert named and len(named) < 20
            await tracker.stop()
            await client.passthrough()

    trio.run(track)


def test_what_it_takes_to_pin_memory_is_told(hosts: NvmeHosts) -> None:
    source, _ = hosts

    async def ask() -> float:
        path = source.folder / "control"
        async with await GatewayClient.connect(path, role=ClientRole.OBSERVER) as client:
            return (await client.status()).pin_ns_per_page

    assert trio.run(ask) == 0.0
    Guest(source)
    assert trio.run(ask) > 0.0


def test_a_check_tells_what_the_target_holds_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: dict[str, NvmeHost] = {}
    monkeypatch.setattr("sync.vfio.endpoint.open_endpoint", lambda at, log: functions[at].open(log))
    kernels = ModelKernel({}), ModelKernel({})
    kernels[1].controller.n_blocks = 8192
    with (
        _closing(Host(tmp_path / "a", kernels[0], functions)) as source,
        _closing(Host(tmp_path / "b", kernels[1], functions)) as target,
    ):

        async def compare() -> None:
            clients = [
                await GatewayClient.connect(host.folder / "control", role=role, session="s")
                for host, role in ((source, ClientRole.SOURCE), (target, ClientRole.TARGET))
            ]
            async with clients[0] as a, clients[1] as b:
                offer = await source_for(view_of(await a.status()), a, ()).offer()
                target_for(offer, view_of(await a.status()), b, ())
                with pytest.raises(IdentityMismatch) as caught:
                    target_for(offer, view_of(await b.status()), b, ())
            told = [str(each) for each in caught.value.differences]
            assert "namespace 1 blocks: 4096 on the source, 8192 on the target" in told

        trio.run(compare)


def test_why_a_device_cannot_move_is_told_to_who_asks(hosts: NvmeHosts) -> None:
    source, _ = hosts
    guest = Guest(source)
    guest.start()
    guest.driver.submit(guest.driver.sqs[0], 0x7C)

    async def stop() -> None:
        client = await GatewayClient.connect(
            source.folder / "control", role=ClientRole.SOURCE, session="s"
        )
        async with client:
            await client.mediate(tracker="none", page_size=4096, capture=False)
            with pytest.raises(DeviceRefusal, match="shadow doorbells are set up"):
                await client.mig_state(MigrationState.STOP_COPY)

    trio.run(stop)


def test_i4_a_move_that_ends_in_any_phase_leaves_guest_and_memory_as_they_were(
    hosts: NvmeHosts,
) -> None:
    source, target = hosts
    abort_everywhere(source, target)
    assert not source.kernel.controller.bad_status
    assert not target.kernel.controller.bad_status


def test_what_a_function_does_at_once_is_answered_at_once(no_ticks: None, hosts: NvmeHosts) -> None:
    """There is no event of a device to wait for, and the guest may be standing still."""
    _, target = hosts

    async def stop_and_go() -> None:
        with trio.fail_after(20):
            path = target.folder / "control"
            async with await GatewayClient.connect(
                path, role=ClientRole.TARGET, session="s"
            ) as there:
                await there.standby("s")
                await there.abandon()

    trio.run(stop_and_go)


class ServedHost:
    """A host whose device is a process that offers no migration."""

    def __init__(self, folder: Path, device: NvmeController | VirtioBlk) -> None:
        folder.mkdir()
        self.folder = folder
        self.device = device
        self.server = Server(folder / "device", device)
        self.events: list[str] = []
        self.gateway = Gateway(
            GatewayOptions(
                folder / "vmm", None, folder / "control", host_function=str(folder / "device")
            ),
            lambda event, **fields: self.events.append(event),
        )
        self.threads = [
            threading.Thread(target=self.server.serve_forever),
            threading.Thread(target=self.gateway.run),
        ]
        for thread in self.threads:
            thread.start()
        self.vmm = Vmm(folder / "vmm")

    def replace(self, name: str) -> None:
        replace_device(self.folder / "control", self.folder / name)

    def renew(self, device: NvmeController | VirtioBlk) -> None:
        """The device goes with all that it knows, and another one takes its place."""
        self.server.close()
        self.threads[0].join(20)
        self.device.close()
        self.device = device
        self.server = Server(self.folder / "device", device)
        self.threads[0] = threading.Thread(target=self.server.serve_forever)
        self.threads[0].start()

    def take(
        self, device: NvmeController | VirtioBlk, server: Server, thread: threading.Thread
    ) -> None:
        """The device that `server` has is the guest's from here on; the one before is ended."""
        self.server.close()
        self.threads[0].join(20)
        self.device.close()
        self.device, self.server, self.threads[0] = device, server, thread

    def close(self) -> None:
        self.vmm.close()
        self.gateway.stop()
        self.threads[1].join(20)
        self.server.close()
        self.threads[0].join(20)
        self.device.close()


@contextmanager
def nvme_processes(folder: Path) -> Iterator[tuple[ServedHost, ServedHost]]:
    image = folder / "image"
    image.write_bytes(bytes(1 << 20))
    devices = [NvmeController([Disk(image)], controller_id=number) for number in range(2)]
    with (
        closing(ServedHost(folder / "a", devices[0])) as source,
        closing(ServedHost(folder / "b", devices[1])) as target,
    ):
        yield source, target


def test_a_guest_moves_between_device_processes_by_their_queues(tmp_path: Path) -> None:
    with nvme_processes(tmp_path) as (source, target):
        move(source, target)


def test_i4_a_device_process_is_left_as_it_was_by_a_move_that_ends_in_any_phase(
    tmp_path: Path,
) -> None:
    with nvme_processes(tmp_path) as (source, target):
        abort_everywhere(source, target)


def test_a_guest_moves_between_virtio_devices_by_their_queues(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with (
        closing(ServedHost(tmp_path / "a", VirtioBlk(Disk(image)))) as source,
        closing(ServedHost(tmp_path / "b", VirtioBlk(Disk(image)))) as target,
    ):
        move_machine(source, target, VirtioGuest(source))


def test_a_guest_moves_between_virtio_functions_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: dict[str, Host[VirtioKernel]] = {}
    monkeypatch.setattr("sync.vfio.endpoint.open_endpoint", lambda at, log: functions[at].open(log))
    blocks: dict[int, bytes] = {}
    with (
        _closing(Host(tmp_path / "a", VirtioKernel(blocks), functions)) as source,
        _closing(Host(tmp_path / "b", VirtioKernel(blocks), functions)) as target,
    ):
        move_machine(source, target, VirtioGuest(source, ACCESS_PLATFORM))


def test_i4_a_function_whose_dma_may_go_past_the_iommu_is_not_served(tmp_path: Path) -> None:
    kernel = VirtioKernel({}, more=0)
    FakeSysfs(tmp_path / "sys").add(ADDRESS, driver="vfio-pci", group="7")
    device = VfioDevice(PciFunction(ADDRESS, tmp_path / "sys"), kernel)
    endpoint = HostEndpoint(device, lambda event, **fields: None)
    with pytest.raises(Disconnected, match="VIRTIO_F_ACCESS_PLATFORM"):
        for _ in range(1000):
            endpoint.receive()
    endpoint.close()
    assert not kernel.opened


def test_a_guest_goes_on_with_the_next_process_of_its_device(tmp_path: Path) -> None:
    """Which gets what was under way in the last one; as often as it takes."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with closing(ServedHost(tmp_path / "a", NvmeController([Disk(image)]))) as host:
        guest = Guest(host)
        guest.start()
        for number in range(3):
            guest.work(20)
            guest.ask(5)
            host.renew(NvmeController([Disk(image)]))
            guest.take_all()
            assert host.events.count("device-back") == number + 1
        guest.work(20)


@pytest.mark.parametrize("kind", ["nvme", "virtio"])
def test_a_device_that_moves_by_its_queues_is_replaced_with_work_under_way(
    tmp_path: Path, kind: str
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))

    def build() -> NvmeController | VirtioBlk:
        return NvmeController([Disk(image)]) if kind == "nvme" else VirtioBlk(Disk(image))

    with closing(ServedHost(tmp_path / "a", build())) as host:
        guest: Guest | VirtioGuest = Guest(host) if kind == "nvme" else VirtioGuest(host)
        guest.start()
        for number in range(3):
            guest.work(20)
            if isinstance(guest, Guest):
                guest.ask(5)
            device = build()
            server = Server(host.folder / f"new{number}", device)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            host.replace(f"new{number}")
            host.take(device, server, thread)
            if isinstance(guest, Guest):
                guest.take_all()
        guest.work(20)
        assert host.events.count("device-replaced") == 3
        assert "device-away" not in host.events


def test_i9_a_guest_is_served_while_who_is_to_replace_its_device_says_nothing(
    tmp_path: Path,
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with (
        closing(ServedHost(tmp_path / "a", NvmeController([Disk(image)]))) as host,
        socket.socket(socket.AF_UNIX) as mute,
    ):
        guest = Guest(host)
        guest.start()
        mute.bind(str(host.folder / "mute"))
        mute.listen()
        ended: list[Exception] = []

        def replace() -> None:
            try:
                host.replace("mute")
            except GatewayError as error:
                ended.append(error)

        asking = threading.Thread(target=replace)
        asking.start()
        asked, _ = mute.accept()
        asked.recv(1)
        guest.work(5)
        assert not ended
        asked.close()
        asking.join(20)
        assert isinstance(ended[0], NewDeviceUnreachable)
        guest.work(5)


def test_a_gateway_goes_on_when_its_vmm_went(hosts: NvmeHosts) -> None:
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
