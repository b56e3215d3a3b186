"""QEMU's own e1000 behind gateways: a driver in the middle of its traffic goes on at another one of
the same network, by capture and replay with the profile that comes along. The peer on the network
is a third one, which the emulated host's kernel drives."""

import fcntl
import os
import socket
import struct
import time
from typing import cast

import trio

from ferry.migration.devices import view_of
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.registers.choose import source_for, target_for
from sync.registers.find import load_profiles
from sync.vfio.sysfs import PciFunction
from sync.vfio_user.protocol import DmaMap, IrqSet, SetIrqs
from tests.lab.devices.e1000_driver import (
    DEADLINE_S,
    IOVA,
    MAC,
    PEER,
    RAM_BYTES,
    Driver,
    Machine,
    Ram,
    frame,
)
from tests.sync.vfio.moving import Served

ETHERTYPE = 0x88B5
IDENTITY = (0x8086, 0x100E)
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _UP = 0x8913, 0x8914, 1


class Network:
    """The peer's end of the network: frames of our ethertype."""

    def __init__(self, function: PciFunction) -> None:
        (name,) = (function.sysfs / "bus/pci/devices" / function.address / "net").iterdir()
        with socket.socket() as any_socket:
            request = struct.pack("16sH14x", name.name.encode(), 0)
            flags = struct.unpack_from("16xH", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[0]
            request = struct.pack("16sH14x", name.name.encode(), flags | _UP)
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
        self._socket.bind((name.name, ETHERTYPE))
        self._socket.settimeout(DEADLINE_S)

    def deliver(self, data: bytes) -> None:
        self._socket.send(data)

    def next(self) -> bytes:
        return self._socket.recv(1 << 16)


class Vmm:
    """A VMM at a gateway, as the driver's machine."""

    def __init__(self, host: Served, ram: Ram, network: Network) -> None:
        self.host = host
        self.ram = ram
        self.link = network
        self.nic = host.vmm
        self.line = os.eventfd(0, os.EFD_NONBLOCK)
        host.vmm.dma_map(DmaMap(3, 0, IOVA, RAM_BYTES), ram.fd)
        flags = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        host.vmm.set_irqs(SetIrqs(flags, 0, 0, 1), [self.line])

    def read(self, region: int, offset: int, size: int) -> bytes:
        return self.host.vmm.region_read(region, offset, size)

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.host.vmm.region_write(region, offset, data)


class Nic(Driver):
    """Its I/O BAR does nothing in QEMU's; what goes out is for the peer."""

    def io(self, offset: int, value: int) -> None:
        self.w(offset, value)

    def traffic(self, numbers: range) -> None:
        """Both ways. Frames that came while nobody listened may come again, for the network keeps
        them for a NIC that takes none."""
        end = time.monotonic() + DEADLINE_S + len(numbers)
        for number in numbers:
            data, answer = frame(number, 60 + number % 40, PEER, MAC), frame(1000 + number)
            self.queue(self.legacy(data, 2048 * (number % 16)))
            self.kick()
            assert self.machine.link.next() == data
            self.machine.link.deliver(answer)
            got: list[bytes] = []
            while answer not in got:
                assert time.monotonic() < end, f"frame {number} does not arrive"
                self.wait()
                got += self.received()


async def carry_over(source: Served, target: Served, peer: PciFunction) -> dict[str, object]:
    """What the target said of its registers in the end."""
    ram, network = Ram(), Network(peer)
    here, there = (Vmm(host, ram, network) for host in (source, target))
    driver = Nic(cast(Machine, here))
    driver.begin()
    driver.traffic(range(1, 22))
    profiles = load_profiles()
    a = await GatewayClient.connect(
        source.folder / "control", role=ClientRole.SOURCE, session="nic"
    )
    b = await GatewayClient.connect(
        target.folder / "control", role=ClientRole.TARGET, session="nic"
    )
    async with a, b:
        near = source_for(view_of(await a.status()), a, profiles)
        far = target_for(await near.offer(), view_of(await b.status()), b, profiles)
        await far.check()
        await b.standby("nic")
        mediation = await a.mediate(tracker="none", capture=True, snapshot=await near.snapshot())
        async for payload in near.begin(mediation.values, mediation.journal_seq):
            await far.receive(payload)
        await trio.to_thread.run_sync(driver.traffic, range(100, 109))
        async for payload in near.precopy():
            await far.receive(payload)
        await near.quiesce()
        await a.stop(fence=near.fence, resume=near.resume_records())
        async for payload in near.final():
            await far.receive(payload)
        report = await far.finish()
        await a.release("nic")
        await b.own("nic")
        await b.start(far.start_records())
        driver.machine = driver.port = cast(Machine, there)
        await trio.to_thread.run_sync(driver.traffic, range(200, 240))
    return {"divergences": dict(report.divergences)}
