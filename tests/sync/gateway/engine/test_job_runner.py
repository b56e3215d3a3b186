"""Jobs at the device: order, window, deadlines, and their end when the device goes."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sync.gateway.datapath.relay import Relay
from sync.gateway.engine.job_runner import WINDOW, Call, Job, JobRunner
from sync.gateway.errors import Defect, DeviceLost, DeviceRefused, DeviceTimeout, GatewayError
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.protocol import HEADER, encode_message


class Table:
    """A runner whose device answers when told to."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.now = 0.0
        self.relay = Relay(self._take)
        self.runner = JobRunner(self.relay, lambda: self.now, 5.0)
        self.outcome: list[tuple[object, object]] = []

    def _take(self, data: bytes | bytearray | memoryview, descriptors: Sequence[int]) -> None:
        self.sent.append(bytes(data))
        for descriptor in descriptors:
            os.close(descriptor)

    def start(self, job: Job[Any], *, held: bool = False) -> None:
        self.runner.start(
            job, lambda result, error: self.outcome.append((result, error)), held=held
        )

    def answer(self, count: int, body: bytes = b"") -> None:
        for _ in range(count):
            number, command, *_ = HEADER.unpack_from(self.sent.pop(0))
            reply = encode_message(number, command, body, reply=True)
            self.relay.from_device(number, command, 1, 0, memoryview(bytearray(reply)), [])


@pytest.fixture
def table() -> Table:
    return Table()


def test_no_more_than_a_window_is_under_way_and_answers_keep_their_order(table: Table) -> None:
    def job() -> Job[str]:
        answers = yield [Call(100 + number) for number in range(100)]
        assert [answer.body for answer in answers] == [bytes([number % 7]) for number in range(100)]
        return "done"

    table.start(job())
    done = 0
    while not table.outcome:
        assert len(table.sent) <= WINDOW
        assert HEADER.unpack_from(table.sent[0])[1] == 100 + done
        table.answer(1, bytes([done % 7]))
        done += 1
    assert table.outcome == [("done", None)]
    assert done == 100 and table.sent == []


def test_empty_lists_cost_nothing_and_errors_end_the_job(table: Table) -> None:
    def job() -> Job[None]:
        assert (yield []) == []
        (answer,) = yield [Call(1)]
        answer.error = 5
        answer.expect("this")

    table.start(job())
    table.answer(1)
    assert isinstance(table.outcome[0][1], DeviceRefused)
    assert not table.runner.busy and table.runner.deadline is None


def test_i10_a_held_job_has_one_deadline_for_all_of_its_steps_and_ends_when_the_device_answers(
    table: Table,
) -> None:
    ended: list[str] = []

    def job() -> Job[None]:
        for _ in range(6):
            yield [Call(1)]
        ended.append("job")

    table.runner.on_late_end = lambda: ended.append("late")
    table.start(job(), held=True)
    assert table.relay.holding
    for table.now in (1.0, 2.0, 3.0, 4.0):
        table.answer(1)
        table.runner.expire(table.now)
    assert table.outcome == []
    table.runner.expire(5.0)
    assert isinstance(table.outcome[0][1], DeviceTimeout)
    assert table.runner.overdue
    assert table.runner.busy
    assert table.relay.holding, "the device is in between"
    table.runner.expire(500.0)
    table.answer(2)
    assert ended == ["job", "late"]
    assert len(table.outcome) == 1
    assert not table.relay.holding
    assert not table.runner.overdue


def test_an_overdue_job_ends_with_its_device(table: Table) -> None:
    def job() -> Job[None]:
        yield [Call(1)]

    table.start(job(), held=True)
    table.runner.expire(6.0)
    table.runner.abort(DeviceLost("gone"))
    assert len(table.outcome) == 1
    assert not table.runner.busy


def test_the_gateways_own_standstill_does_not_count(table: Table) -> None:
    def job() -> Job[None]:
        yield [Call(1)]

    table.start(job(), held=True)
    table.runner.forgive(100.0)
    table.runner.expire(104.0)
    assert table.outcome == []
    table.runner.expire(105.0)
    assert len(table.outcome) == 1


def test_a_job_that_holds_nobody_up_only_fails_itself(table: Table) -> None:
    def job() -> Job[None]:
        yield [Call(1)]
        yield [Call(2)]

    table.start(job())
    table.now = 4.0
    table.answer(1)
    table.runner.expire(6.0)
    assert table.outcome == []
    table.runner.expire(9.5)
    assert isinstance(table.outcome[0][1], DeviceTimeout)
    table.answer(1)
    assert len(table.outcome) == 1, "the late answer is nobody's"

    def another() -> Job[None]:
        yield [Call(3)]

    table.start(another())
    table.answer(1)
    assert table.outcome[1] == (None, None)


def test_the_descriptors_of_an_answer_that_nobody_takes_are_closed(
    table: Table, open_fds: Callable[[], int]
) -> None:
    def job() -> Job[None]:
        yield [Call(1), Call(2)]

    before = open_fds()

    def answer_with_descriptor() -> None:
        number, command, *_ = HEADER.unpack_from(table.sent.pop(0))
        reply = memoryview(bytearray(encode_message(number, command, reply=True)))
        table.relay.from_device(number, command, 1, 0, reply, [os.dup(0)])

    table.start(job())
    answer_with_descriptor()
    answer_with_descriptor()
    assert table.outcome == [(None, None)]
    table.start(job())
    answer_with_descriptor()
    table.runner.abort(DeviceLost("gone"))
    answer_with_descriptor()
    assert open_fds() == before


def test_a_job_waits_until_the_vmms_own_changes_are_through(table: Table) -> None:
    def job() -> Job[None]:
        yield [Call(1)]

    table.relay.hold()
    table.start(job(), held=True)
    assert table.sent == []
    table.relay.let_go()
    assert len(table.sent) == 1 and table.relay.holding
    table.answer(1)
    assert not table.relay.holding


def test_a_job_aborted_before_it_began_does_nothing(table: Table) -> None:
    def job() -> Job[None]:
        yield [Call(1)]

    table.relay.hold()
    table.start(job(), held=True)
    table.runner.abort(DeviceLost("gone"))
    table.relay.let_go()
    assert table.sent == [] and not table.relay.holding
    assert isinstance(table.outcome[0][1], DeviceLost)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ProtocolError("nonsense"), ProtocolError),
        (OSError(24, "none left"), GatewayError),
        (ZeroDivisionError(), Defect),
    ],
)
def test_i9_whatever_is_wrong_in_a_job_costs_the_job_and_lets_the_guest_go_on(
    table: Table, error: Exception, told: type[Exception]
) -> None:
    def job() -> Job[None]:
        yield [Call(1)]
        raise error

    table.start(job(), held=True)
    table.answer(1)
    assert isinstance(table.outcome[0][1], told)
    assert not table.relay.holding and not table.runner.busy
