"""A guest process whose disk is a namespace: what its driver does at our controller, and finds."""

import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lab.devices.disk import Disk
from lab.devices.nvme.controller import NvmeController
from lab.devices.nvme.queues import Entry, Status
from lab.guest.control import guest_report, verify_guest
from lab.guest.errors import GuestPanic, StreamError
from lab.guest.fields import Fields
from lab.guest.nvme_queue import CQE, SQE, QueuePair, Sizes
from lab.guest.ram import LOW_DMA_RESTART, Ram
from sync.vfio_user.protocol import DmaFlags
from sync.vmm.driver import Vmm

DEADLINE_S = 30.0
MIB = 1 << 20


def drive(path: str, body: Callable[[Vmm], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with await Vmm.connect(path, deadline_s=DEADLINE_S) as vmm:
                await body(vmm)

    trio.run(main)


async def until(vmm: Vmm, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    while not condition(report := await guest_report(vmm)):
        assert not report["failure"], report
        await trio.sleep(0.01)
    return report


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4 * MIB))
    return path


class Strange(NvmeController):
    """Fails one read, and answers another one with what is not on the disk."""

    reads = 0

    def _io(self, entry: Entry) -> int:
        self.reads += entry.opcode == 2
        if entry.opcode == 2 and self.reads == 20:
            return Status.INTERNAL_ERROR
        status = super()._io(entry)
        if entry.opcode == 2 and self.reads == 40:
            [segment, *_] = self._segments(entry, 512, DmaFlags.WRITE)
            self.memory.write_segment(segment, bytes(512))
        return status


@pytest.mark.parametrize(("depth", "block_bytes"), [(1, 4096), (2, 65536), (7, 4096), (16, 65536)])
def test_it_works_and_finds_nothing_wrong(
    bench: Any, image: Path, depth: int, block_bytes: int
) -> None:
    """With pages alone, and with lists of pages; each queue has wrapped when it ends."""
    controller = NvmeController([Disk(image)], serial="serial")
    bench.serve(controller, "g-dev")
    sizes = {"read_area_bytes": 2 * MIB, "write_area_bytes": 2 * MIB, "high_bytes": 4 * MIB}
    bench.start(
        "g",
        **{"disk": "nvme", "queue_depth": depth, "queue_size": 64, "blocks": 40, **sizes},
        block_bytes=block_bytes,
        iops=0.0,
        flush_every=8,
    )

    async def body(vmm: Vmm) -> None:
        report = await until(vmm, lambda r: r["operations"] > 300 and r["flushes"] > 5)
        assert report["device_id"] == "serial"
        assert report["interrupts"] > 10
        verified = await verify_guest(vmm)
        assert verified["verification"]["state"] == "passed", verified
        assert verified["verification"]["blocks"] > 8
        for name in ("checksum_errors", "buffer_errors", "io_errors", "access_errors"):
            assert verified[name] == 0, verified
        assert verified["device_resets"] == verified["device_reconnects"] == 0

    drive(bench.path("g"), body)
    assert {ring.size for ring in controller._sqs.values()} == {16, 64, depth + 1}
    assert len(controller._event_requests) == 1


def test_what_the_controller_does_wrong_is_found(bench: Any, image: Path) -> None:
    bench.serve(Strange([Disk(image)]), "g-dev")
    bench.start("g", disk="nvme")

    async def body(vmm: Vmm) -> None:
        report = await until(vmm, lambda r: r["reads"] > 60)
        assert report["io_errors"] == 1
        assert report["checksum_errors"] == 1

    drive(bench.path("g"), body)


def test_a_controller_that_went_is_initialised_and_what_was_in_flight_is_done_again(
    bench: Any, image: Path
) -> None:
    end = bench.serve(NvmeController([Disk(image)]), "g-dev")
    bench.start("g", disk="nvme")

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["operations"] > 50)
        end()
        bench.serve(NvmeController([Disk(image)]), "g-dev")
        before = (await until(vmm, lambda r: r["device_resets"] == 1))["operations"]
        await until(vmm, lambda r: r["operations"] > before + 50)
        verified = await verify_guest(vmm)
        assert verified["verification"]["state"] == "passed", verified
        assert verified["io_errors"] == verified["checksum_errors"] == 0

    drive(bench.path("g"), body)


def test_rings_wrap_each_in_its_own_time() -> None:
    ram = Ram(2 * MIB, 4096)
    pair = QueuePair(ram, LOW_DMA_RESTART, Sizes(3, 4))
    phase = 1
    for number in range(40):
        assert not pair.take()
        pair.add(2, number, 1, (0, 0), number)
        at = pair.sq_address + SQE.size * (number % 3)
        assert struct.unpack_from("<BBH", ram.view(at, 4)) == (2, 0, number)
        assert pair.sq_tail == (number + 1) % 3
        ram.store(pair.cq_address + CQE.size * (number % 4), CQE, 0, 0, 0, number, 6 | phase)
        assert pair.take() == [(number, 3, 0)]
        phase = phase if number % 4 < 3 else 1 - phase
    other = QueuePair(ram, LOW_DMA_RESTART, Sizes(3, 4))
    other.load_state(Fields(pair.state(), "state"))
    assert other.state() == pair.state()
    with pytest.raises(StreamError):
        other.load_state(Fields({**pair.state(), "sq_tail": 3}, "state"))
    ram.close()


def test_a_ring_that_has_no_end_is_a_panic() -> None:
    class Endless(Ram):
        def load(self, address: int, layout: struct.Struct) -> tuple[Any, ...]:
            flips = self.loads // 4 % 2
            self.loads += 1
            return 0, 0, 0, 0, 1 - flips

        loads = 0

    ram = Endless(2 * MIB, 4096)
    with pytest.raises(GuestPanic):
        QueuePair(ram, LOW_DMA_RESTART, Sizes(3, 4)).take()
    ram.close()
