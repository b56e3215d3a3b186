"""Register accesses of a mediated device: captured in order; copied without a trace."""

import errno
import struct
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sync.gateway.engine.custody import CustodyState
from sync.gateway.errors import (
    BadRequest,
)
from sync.registers.record import (
    RECORD_BYTES,
    Access,
    Op,
    pack_accesses,
    unpack_accesses,
)
from sync.vfio_user.protocol import (
    Command,
    Feature,
    FeatureIndex,
    RegionAccess,
    WriteMulti,
)
from tests.sync.gateway.conftest import Bench
from tests.sync.gateway.mediation import (
    BANKED,
    COUNTER,
    SELECTOR,
    guest_read,
    guest_write,
    mediate,
    mediating,
    reading,
    take_journal,
    writing,
)

ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "posted", "multi", "posted multi", "reset", "step"]),
        st.integers(0, 60),
        st.binary(min_size=1, max_size=12),
        st.sampled_from([0, 0, 7]),
    ),
    max_size=40,
)


def issue(bench: Bench, kind: str, offset: int, data: bytes, region: int) -> None:
    if kind == "read":
        guest_read(bench, offset, len(data), region)
    elif kind in ("write", "posted"):
        guest_write(bench, offset, data, posted=kind == "posted", region=region)
    elif kind == "reset":
        bench.vmm(Command.DEVICE_RESET)
    elif kind == "step":
        bench.step()
    else:
        writes = tuple(
            RegionAccess(offset + number, region, 1, bytes([byte]))
            for number, byte in enumerate(data)
        )
        posted = kind.startswith("posted")
        bench.vmm(Command.REGION_WRITE_MULTI, WriteMulti(writes).pack(), posted=posted)


@given(ACCESSES, st.sets(st.integers(0, 60), max_size=3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_i4_the_journal_is_what_the_device_executed_in_its_order(
    make_bench: Callable[..., Bench], accesses: list[tuple[str, int, bytes, int]], refused: set[int]
) -> None:
    """The oracle is the device's own log. The VMM pipelines as much as it likes, the device may
    refuse some registers, and accesses of the time before are not in the journal."""
    bench = make_bench()
    registers = bench.device.registers
    bench.link.journal.posted(0, 0, b"from a mediation before")
    guest_write(bench, 1, b"before", posted=True)
    guest_read(bench, 2)
    outcome = bench.start(
        mediating(bench, snapshot=pack_accesses([reading(COUNTER)])),
        held=True,
    )
    guest_read(bench, 3)
    bench.settle()
    assert outcome[0][1] is None
    at_snapshot = registers.log.index(Access(Op.READ, 0, COUNTER, 4, b"\1\0\0\0"))
    registers.refuse_offsets = refused
    for kind, offset, data, region in accesses:
        # Nobody is told that a posted write was refused.
        if "posted" not in kind or not refused & set(range(offset, offset + len(data))):
            issue(bench, kind, offset, data, region)
    bench.settle()
    executed = registers.log[at_snapshot + 1 :]
    journal = take_journal(bench)
    assert [a for a in journal if not a.failed] == [a for a in executed if not a.failed]
    assert executed[0].offset == 3
    bench.close()


def test_an_access_the_device_refuses_is_journaled_as_failed(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    mediate(bench)
    bench.device.registers.refuse_offsets = {8}
    number = guest_read(bench, 8)
    guest_write(bench, 8, b"abcd")
    bench.settle()
    assert bench.reply_to(number)[0] == errno.EIO
    assert take_journal(bench) == [
        Access(Op.READ, 0, 8, 4, bytes(4), failed=True),
        Access(Op.WRITE, 0, 8, 4, b"abcd", failed=True),
    ]


def test_the_rest_of_a_multi_write_that_stopped_is_journaled_as_failed(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    mediate(bench)
    bench.device.registers.refuse_offsets = {1}
    writes = tuple(RegionAccess(offset, 0, 1, b"x") for offset in range(3))
    bench.ask(Command.REGION_WRITE_MULTI, WriteMulti(writes).pack())
    assert [access.failed for access in take_journal(bench)] == [False, True, True]


def test_without_capture_nothing_is_journaled(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(v2=True)
    mediate(bench, capture=False)
    guest_write(bench, 0, b"abcd")
    bench.settle()
    assert bytes(bench.device.registers.bar[:4]) == b"abcd"
    assert bench.link.journal.n_records == 0


@pytest.mark.parametrize(
    "body",
    [
        RegionAccess(0, 0, 0).pack(),
        RegionAccess(0, 0x10000, 4).pack(),
        RegionAccess((1 << 64) - 2, 0, 4).pack(),
        RegionAccess(0, 0, (1 << 20) + 1).pack(),
    ],
)
def test_i9_an_access_that_no_record_can_hold_is_refused(
    make_bench: Callable[..., Bench], body: bytes
) -> None:
    bench = make_bench()
    mediate(bench)
    assert bench.ask(Command.REGION_READ, body)[0] == errno.EINVAL
    assert bench.device.registers.log == []
    assert bench.link.journal.n_records == 0


def test_the_vmm_keeps_its_fingers_off_the_migration_state(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(v2=True)
    request = Feature.get(FeatureIndex.MIGRATION, 8).pack()
    assert bench.ask(Command.DEVICE_FEATURE, request)[0] == 0
    mediate(bench)
    assert bench.ask(Command.DEVICE_FEATURE, request)[0] == errno.EBUSY


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_snapshot_of_a_banked_register_leaves_no_trace(
    make_bench: Callable[..., Bench], data: st.DataObject
) -> None:
    """The guest selects banks and uses them all the time, pipelined; the snapshot selects banks of
    its own. The oracle is a guest that is alone with its device."""
    steps = st.tuples(st.sampled_from(["select", "write", "read"]), st.integers(0, 3))
    before = data.draw(st.lists(steps, max_size=8))
    meanwhile = data.draw(st.lists(steps, max_size=8))
    stepped = data.draw(st.integers(0, 8))
    alone, bench = make_bench(), make_bench()

    def play(which: Bench, script: list[tuple[str, int]]) -> list[int]:
        numbers = []
        for kind, value in script:
            raw = value.to_bytes(4, "little")
            if kind == "select":
                guest_write(which, SELECTOR, raw, posted=True)
            elif kind == "write":
                guest_write(which, BANKED, raw, posted=True)
            else:
                numbers.append(guest_read(which, BANKED))
        return numbers

    expected = play(alone, before + meanwhile)
    alone.settle()
    snapshot = [reading(SELECTOR)]
    for bank in range(4):
        snapshot += [writing(SELECTOR, bank), reading(BANKED)]
    # Nobody knows beforehand what the guest has selected by then: it is written back.
    snapshot.append(writing(SELECTOR, 99, back=True))
    numbers = play(bench, before)
    outcome = bench.start(
        mediating(bench, snapshot=pack_accesses(snapshot)),
        held=True,
    )
    for _ in range(stepped):
        bench.step()
    numbers += play(bench, meanwhile)
    bench.settle()
    ((mediated, error),) = outcome
    assert error is None
    assert [bench.reply_to(n) for n in numbers] == [alone.reply_to(n) for n in expected]
    assert bench.device.registers.banks == alone.device.registers.banks
    assert bench.device.registers.bar == alone.device.registers.bar
    values = list(unpack_accesses(mediated.values))
    assert values[-1].data == values[0].data, "written back is what was read first"
    # The snapshot and the journal together are the device as the guest has left it.
    banks = {bank: values[2 + 2 * bank].data for bank in range(4)}
    selected = int.from_bytes(values[0].data, "little")
    for access in take_journal(bench):
        if access.op is Op.WRITE and access.offset == SELECTOR:
            selected = int.from_bytes(access.data, "little")
        elif access.op is Op.WRITE:
            banks[selected] = access.data
    final = bench.device.registers
    assert banks == {bank: final.banks.get(bank, bytes(4)) for bank in range(4)}
    for each in (alone, bench):
        each.close()


def test_the_snapshot_comes_back_in_the_shape_it_was_given(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    bench.device.registers.bar[64:84] = bytes(range(20))
    bench.device.registers.refuse_offsets = {4}
    asked = pack_accesses([reading(64, 20), reading(4), writing(0, 7)], seq=50)
    mediated = mediate(bench, snapshot=asked)
    assert len(mediated.values) == len(asked)
    values = list(unpack_accesses(mediated.values))
    assert values[0].data == bytes(range(20))
    assert [access.failed for access in values] == [False, True, False]
    seqs = [struct.unpack_from("<Q", mediated.values, at)[0] for at in range(0, 160, RECORD_BYTES)]
    assert seqs == [50, 51, 52, 53, 54]


def test_a_snapshot_that_is_no_batch_changes_nothing(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    for nonsense in (b"x" * 31, bytes(31) + b"\xff", pack_accesses([reading(1 << 63, 8)])[:16]):
        with pytest.raises(BadRequest):
            mediate(bench, snapshot=nonsense)
    assert bench.custody.state is CustodyState.PASSTHROUGH
    assert bench.device.commands == []
