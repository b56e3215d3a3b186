"""The workload against a model of a disk: it finds what is wrong, and nothing else."""

import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from lab.guest.errors import GuestPanic, StreamError
from lab.guest.fields import Fields
from lab.guest.layout import Layout
from lab.guest.options import GuestOptions
from lab.guest.ram import Ram
from lab.guest.requests import Kind, Request
from lab.guest.workload import Workload

MIB = 1 << 20
BLOCK = 4096


def make_options(**changes: Any) -> GuestOptions:
    chosen: dict[str, Any] = {
        "device_path": "",
        "qmp_path": "",
        "low_bytes": 4 * MIB,
        "high_bytes": 4 * MIB,
        "queue_depth": 4,
        "block_bytes": BLOCK,
        "blocks": 32,
        "flush_every": 10,
        "read_area_bytes": MIB,
        "write_area_bytes": 256 << 10,
        "cache_area_bytes": 64 << 10,
        "content": (__file__,),
    }
    return GuestOptions(**{**chosen, **changes})


class Model:
    """A workload and a disk that does what it is asked to, in any order."""

    def __init__(self, **changes: Any) -> None:
        self.options = make_options(**changes)
        self.ram = Ram(self.options.low_bytes, self.options.high_bytes)
        self.workload = Workload(self.ram, Layout.of(self.options), self.options)
        self.disk: dict[int, bytes] = {}
        self.in_flight: list[Request] = []
        self.random = random.Random(7)
        self.now = 1000.0

    def submit(self) -> Request | None:
        request = self.workload.next_request(self.now)
        if request is not None:
            request.submitted_at = self.now
            blocks = [other.block for other in self.in_flight if other.kind is not Kind.FLUSH]
            assert request.kind is Kind.FLUSH or request.block not in blocks
            self.in_flight.append(request)
        return request

    def finish(self, status: int = 0) -> Request:
        request = self.in_flight.pop(self.random.randrange(len(self.in_flight)))
        address = self.workload.data_address(request)
        if request.kind is Kind.WRITE:
            self.disk[request.block] = bytes(self.ram.view(address, BLOCK))
        elif request.kind is Kind.READ and not status:
            self.ram.write(address, self.disk[request.block])
        self.workload.complete(request, status, self.now)
        return request

    def work(self, count: int) -> None:
        for _ in range(count):
            self.now += 0.001
            while len(self.in_flight) < self.options.queue_depth and self.submit():
                pass
            self.finish()

    def verify(self) -> Any:
        self.workload.start_verification()
        for _ in range(1000):
            if not self.workload.verification.running:
                return self.workload.verification
            while len(self.in_flight) < self.options.queue_depth and self.submit():
                pass
            if self.in_flight:
                self.finish()
        raise AssertionError("the verification does not end")


@pytest.fixture
def model() -> Iterator[Model]:
    made = Model()
    yield made
    made.ram.close()


def test_a_good_disk_gives_no_errors(model: Model) -> None:
    model.work(500)
    counters = model.workload.counters
    assert counters.reads > 100 and counters.writes > 50 and counters.flushes >= 5
    assert counters.operations == 500
    assert not counters.notes
    verification = model.verify()
    assert verification.state == "passed"
    assert verification.blocks == len(model.disk)
    assert verification.buffers > 50


def test_blocks_differ_even_where_the_content_repeats(model: Model) -> None:
    model.work(300)
    assert len(set(model.disk.values())) == len(model.disk)


def test_a_block_in_another_ones_place_is_found(model: Model) -> None:
    model.work(300)
    first, second = list(model.disk)[:2]
    model.disk[first], model.disk[second] = model.disk[second], model.disk[first]
    verification = model.verify()
    assert verification.errors == 2
    assert any(f"its stamp says block {second}" in note for note in model.workload.counters.notes)


def test_a_lost_write_is_found(model: Model) -> None:
    model.work(300)
    before = dict(model.disk)
    model.work(50)
    changed = [block for block in before if before[block] != model.disk[block]]
    model.disk[changed[0]] = before[changed[0]]
    assert model.verify().errors == 1


def test_a_failed_write_leaves_a_block_that_is_not_judged(model: Model) -> None:
    while model.submit() is None or model.in_flight[-1].kind is not Kind.WRITE:
        model.finish()
    block = model.in_flight[-1].block
    while model.in_flight:
        model.finish(status=1)
    assert model.workload.counters.io_errors > 0
    model.disk[block] = b"whatever".ljust(BLOCK)
    assert model.verify().state == "passed"


def test_the_rate_is_kept_to() -> None:
    model = Model(iops=100.0)
    submitted = 0
    for _ in range(1000):
        model.now += 0.001
        if len(model.in_flight) < 4 and model.submit():
            submitted += 1
            model.finish()
    assert 95 <= submitted <= 105
    assert model.workload.idle_s(model.now, slots_free=True) <= 0.02
    model.ram.close()


def test_the_cpu_writes_pages_of_its_own_at_its_rate(model: Model) -> None:
    start = model.workload.counters.cpu_pages
    for _ in range(2000):
        model.now += 0.001
        model.workload.cpu_work(model.now)
    assert 350 <= model.workload.counters.cpu_pages - start <= 450


def test_a_disk_that_is_too_small_is_refused(model: Model) -> None:
    with pytest.raises(GuestPanic):
        model.workload.limit_blocks(7 * BLOCK)


def test_the_state_moves(model: Model) -> None:
    model.work(200)
    state = model.workload.state()
    other = Model()
    other.workload.load_state(Fields(state, "state"))
    assert other.workload.counters == model.workload.counters
    moved = other.workload.state()
    # The source of randomness goes on, but not with the same numbers.
    assert {**moved, "random": 0} == {**state, "random": 0}
    other.ram.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_blocks", 33),
        ("n_blocks", 0),
        ("next_read_buffer", 1 << 40),
        ("next_write_buffer", -1),
        ("next_cache_page", "x"),
        ("random", 1.5),
        ("device_id", "x" * 1000),
        ("counters", {}),
        ("counters", None),
        ("verification", []),
    ],
)
def test_i9_a_senseless_state_is_refused(model: Model, name: str, value: Any) -> None:
    state = {**model.workload.state(), name: value}
    with pytest.raises(StreamError):
        model.workload.load_state(Fields(state, "state"))
    del state[name]
    with pytest.raises(StreamError, match=name):
        model.workload.load_state(Fields(state, "state"))


def test_the_stamp_is_part_of_what_is_written(model: Model) -> None:
    model.work(100)
    for block, data in model.disk.items():
        assert struct.unpack_from("<Q", data) == (block,)
