"""The register journal without a device: captured and encoded, carried, checked and decoded.

`encode` is what the gateway does with each access and its answer; `carry` what `send` does with the
records that it takes; `order` what `receive` does with them: exactly once, in order, and what is to
be executed now. The accesses are those of a driver's interrupt handler and of its doorbells:
`virtio-blk` (posted doorbells, reads of the interrupt status), and `e1000` (interrupts masked, the
cause read, a tail moved, interrupts unmasked).
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import trio

from lab.devices.disk import Disk
from lab.devices.virtio.blk import VirtioBlk
from perf.benchmark import Context, Measurement, cpu_seconds
from perf.errors import BenchmarkFailed
from sync.gateway.datapath.journal import Journal
from sync.registers.capture import CaptureSource
from sync.registers.find import find_profile, load_profiles
from sync.registers.interface import GatewayPort
from sync.registers.payload import Assembler
from sync.registers.profile.layout import Layout
from sync.registers.profile.locate import DeviceView
from sync.registers.record import RECORD_BYTES, Op
from sync.registers.replay import Replayer
from sync.vfio_user.protocol import PciRegion

BATCH_BYTES = 4096 * RECORD_BYTES
"""Bytes of the register operations that the target executes in one go."""
READ, WRITE = int(Op.READ), int(Op.WRITE)
DISK_BYTES = 1 << 20

Step = tuple[int, int, int, bytes]
"""One access: operation, region, offset, and the data written or read."""


def virtio_blk() -> tuple[Layout, list[Step]]:
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(DISK_BYTES)
        device = VirtioBlk(Disk(Path(image.name)), n_workers=1)
        try:
            config = device.config_read(0, 256)
            sizes = {index: device.region_info(index).size for index in range(PciRegion.CONFIG + 1)}
        finally:
            device.close()
    layout = _layout(DeviceView(0x1AF4, 0x1042, 0x1AF4, 0x1100, 0x010000, config, sizes))
    doorbell, status = layout.windows["virtio:notify"], layout.windows["virtio:isr"]
    return layout, [
        (WRITE, doorbell.region, doorbell.offset, bytes(2)),
        (READ, status.region, status.offset, b"\x01"),
    ]


def e1000() -> tuple[Layout, list[Step]]:
    sizes = {0: 128 << 10, 2: 64, PciRegion.CONFIG: 256}
    layout = _layout(DeviceView(0x8086, 0x100E, 0x8086, 0x100E, 0x020000, bytes(256), sizes))

    def at(name: str) -> tuple[int, int]:
        place = layout.place(name)
        assert place is not None
        return place.region, place.offset

    return layout, [
        (WRITE, *at("imc"), b"\xff\xff\xff\xff"),
        (READ, *at("icr"), b"\x80\0\0\0"),
        (WRITE, *at("tdt"), b"\x07\0\0\0"),
        (WRITE, *at("ims"), b"\x9d\0\0\0"),
    ]


def _layout(view: DeviceView) -> Layout:
    profile = find_profile(view, load_profiles())
    assert profile is not None
    return Layout(profile, view)


def journal_port(journal: Journal) -> GatewayPort:
    """A gateway's client of which nothing is there but the journal."""

    async def take(max_records: int) -> tuple[bytes, bool]:
        return journal.take(max_records), journal.overflow

    return cast(GatewayPort, SimpleNamespace(journal=take))


class Pipeline:
    """The way of register operations from the access to the batch that the target's gateway would
    execute."""

    def __init__(self, layout: Layout, steps: list[Step]) -> None:
        self._steps = steps
        self._journal = Journal()
        self._source = CaptureSource(layout, journal_port(self._journal), {})
        self._assembler = Assembler()
        self._replayer = Replayer(layout, 0)
        self._payloads: list[bytes] = []
        self.asked = 0

    def encode(self, n: int) -> None:
        """Enters about `n` operations, whole cycles of the driver's, into the journal. Sets `asked`
        to how many."""
        journal = self._journal
        cycles = n // len(self._steps)
        self.asked = cycles * len(self._steps)
        for _ in range(cycles):
            for op, region, offset, data in self._steps:
                if op == READ:
                    entry = journal.begin(READ, region, offset, len(data))
                    journal.finish(entry, data=data)
                else:
                    journal.posted(region, offset, data)

    def carry(self) -> None:
        async def take() -> None:
            self._payloads = [payload async for payload in self._source.precopy()]

        trio.run(take)

    def order(self) -> None:
        for payload in self._payloads:
            whole = self._assembler.add(payload)
            if whole is None:
                continue
            for start in range(0, len(whole[1]), BATCH_BYTES):
                replay = self._replayer.feed(whole[1][start : start + BATCH_BYTES])
                # A device that does as the source's did: nothing diverges.
                self._replayer.executed(replay, replay.captured.tobytes())

    @property
    def done(self) -> int:
        """How many operations have come through to the end."""
        return self._replayer.statistics.captured


def run(context: Context) -> Iterator[Measurement]:
    cases: dict[str, Callable[[], tuple[Layout, list[Step]]]] = {
        "virtio-blk": virtio_blk,
        "e1000": e1000,
    }
    for case, make in cases.items():
        pipeline = Pipeline(*make())
        where = {"device": case}
        for _ in range(context.repeat):
            before = pipeline.done
            seconds = {
                "encode": cpu_seconds(lambda: pipeline.encode(context.number("operations"))),  # noqa: B023
                "carry": cpu_seconds(pipeline.carry),
                "order": cpu_seconds(pipeline.order),
            }
            n = pipeline.done - before
            if n != pipeline.asked:
                raise BenchmarkFailed(f"of {pipeline.asked} operations, {n} have come through")
            for step, taken in seconds.items():
                yield Measurement(step, n / taken, "1/s", "higher", where)
            yield Measurement("all", n / sum(seconds.values()), "1/s", "higher", where)
