"""Two `edu` devices of QEMU's behind gateways, and their attempts to write guest memory.

Such a device writes 4 KiB at most, wherever it is told to, without any driver: what a controller
could do that has gone mad. Source: QEMU's docs/specs/edu.rst.
"""

import struct
import time

import trio

from lab.vfio_user.client import Client as Vmm
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.custody import ClientRole
from sync.registers.record import Access, Op, pack_accesses
from sync.vfio_user.protocol import DmaMap
from tests.sync.queues.world import GUEST_IOVA
from tests.sync.vfio.moving import Served
from tests.sync.vfio.test_endpoint import CONFIG, RAM_BYTES, Ram

IDENTITY = (0x1234, 0x11E8)
_BUFFER = 0x40000
_SOURCE, _TARGET, _COUNT, _COMMAND = 0x80, 0x88, 0x90, 0x98
_RUN, _TO_RAM = 1, 2
DEADLINE_S = 60.0


def _start() -> list[Access]:
    values = {_SOURCE: _BUFFER, _TARGET: GUEST_IOVA, _COUNT: 64, _COMMAND: _RUN | _TO_RAM}
    return [Access(Op.WRITE, 0, at, 4, struct.pack("<I", value)) for at, value in values.items()]


class Tries:
    """Attempts of the device behind one gateway, each of which would leave a trace in `ram`."""

    def __init__(self, host: Served) -> None:
        self.ram = Ram()
        self.vmm: Vmm = host.vmm
        self.outcomes: dict[str, bool] = {}
        self.vmm.dma_map(DmaMap(3, 0, GUEST_IOVA, RAM_BYTES), self.ram.fd)
        self.enable()

    def enable(self) -> None:
        self.vmm.region_write(CONFIG, 4, b"\x06\x00")

    def by_guest(self, when: str) -> None:
        """Its guest tells it to."""
        for access in _start():
            self.vmm.region_write(access.region, access.offset, access.data)
        end = time.monotonic() + DEADLINE_S
        while self.vmm.region_read(0, _COMMAND, 4)[0] & _RUN:
            assert time.monotonic() < end
        self._look(when)

    async def by_itself(self, when: str, gateway: GatewayClient) -> None:
        """Nobody of the guest tells it to."""
        enable = Access(Op.WRITE, CONFIG, 4, 2, b"\x06\x00")
        await gateway.batch(pack_accesses([enable, *_start()]))
        question = pack_accesses([Access(Op.READ, 0, _COMMAND, 4)])
        running = _RUN
        with trio.fail_after(DEADLINE_S):
            while running & _RUN:
                await trio.sleep(0.01)
                (running,) = struct.unpack_from("<16xQ", await gateway.batch(question))
        self._look(when)

    def _look(self, when: str) -> None:
        self.outcomes[when] = self.ram.bytes[:64] != b"\xa5" * 64
        self.ram.bytes[:64] = b"\xa5" * 64


async def try_to_reach(source: Served, target: Served) -> dict[str, bool]:
    """By what its gateway has been through: whether the device reached guest memory."""
    a, b = Tries(source), Tries(target)
    control = {
        role: await GatewayClient.connect(host.folder / "control", role=role, session="edu")
        for role, host in ((ClientRole.SOURCE, source), (ClientRole.TARGET, target))
    }
    async with control[ClientRole.SOURCE] as at_source, control[ClientRole.TARGET] as at_target:
        a.by_guest("source in passthrough")
        await at_target.standby("edu")
        await b.by_itself("target in standby", at_target)
        await at_source.mediate(tracker="none", capture=False)
        await at_source.stop(fence=True)
        await a.by_itself("source stopped", at_source)
        await at_source.release("edu")
        await at_target.own("edu")
        await b.by_itself("target owns", at_target)
        await at_target.start()
        b.enable()
        b.by_guest("target started")
    return a.outcomes | b.outcomes
