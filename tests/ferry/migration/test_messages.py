"""The greeting and the control records: what comes back is what went in; nothing else gets in."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferry.errors import PeerProtocolError
from ferry.migration.downtime import Downtime
from ferry.migration.messages import (
    PROTOCOL_VERSION,
    DeviceOffer,
    MigrationHello,
    Notice,
    asks_for_check,
    pack_state,
    unpack_state,
)
from ferry.migration.report import Report
from sync.registers.interface import RegisterReport

NUMBERS = st.integers(0, (1 << 64) - 1)
PAIRS = st.lists(st.lists(NUMBERS, min_size=2, max_size=2), max_size=4)
DEVICES = st.builds(
    DeviceOffer,
    identity=st.dictionaries(st.text(max_size=8), NUMBERS, max_size=4),
    regions=PAIRS,
    irqs=PAIRS,
    registers=st.binary(max_size=32).map(bytes.hex),
)
HELLOS = st.builds(
    MigrationHello,
    session=st.binary(min_size=16, max_size=16).map(bytes.hex),
    devices=st.lists(DEVICES, min_size=1, max_size=3),
    layout=st.lists(st.lists(NUMBERS, min_size=4, max_size=4), max_size=4),
    files=st.lists(st.lists(NUMBERS, min_size=2, max_size=2), max_size=4),
    platform=st.binary(max_size=32).map(bytes.hex),
    vmm=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    check=st.booleans(),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["version", "session", "devices", "layout", "files", "identity", "regions", "x"]
            ),
            inner,
            max_size=6,
        )
    ),
)


@given(HELLOS)
def test_a_greeting_arrives_as_it_was_sent(hello: MigrationHello) -> None:
    assert MigrationHello.unpack(hello.pack()) == hello


@given(HELLOS)
def test_a_check_is_told_apart_before_the_rest_is_read(hello: MigrationHello) -> None:
    assert asks_for_check(hello.pack()) == hello.check


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_other_greeting_is_refused(payload: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        MigrationHello.unpack(payload)


@given(HELLOS, st.data())
def test_i9_a_greeting_with_one_thing_wrong_is_refused(
    hello: MigrationHello, data: st.DataObject
) -> None:
    fields = json.loads(hello.pack())
    wrong = data.draw(
        st.sampled_from(["session", "devices", "layout", "files", "platform", "vmm", "check"])
    )
    fields[wrong] = data.draw(st.none() | st.integers() | st.just("no hex") | st.just([[-1, 0]]))
    with pytest.raises(PeerProtocolError):
        MigrationHello.unpack(json.dumps(fields).encode())


def test_another_version_is_told_apart() -> None:
    payload = json.dumps({"version": PROTOCOL_VERSION + 1}).encode()
    with pytest.raises(PeerProtocolError, match="install the same version"):
        MigrationHello.unpack(payload)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(PeerProtocolError):
        Notice.unpack(b"[" * 200_000)


@given(st.integers(0, 63), st.binary(max_size=64))
def test_state_records(device: int, payload: bytes) -> None:
    assert unpack_state(pack_state(device, payload), 64) == (device, payload)


@pytest.mark.parametrize("record", [b"", b"\0", pack_state(2, b"x")])
def test_state_records_for_nobody(record: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        unpack_state(record, 2)


@given(st.text(max_size=2000))
def test_a_reason_is_printable_and_short(text: str) -> None:
    shown = Notice({"reason": text}).text("reason")
    assert len(shown) <= 1000
    assert shown.isprintable()


REPORTED = st.dictionaries(
    st.sampled_from(["method", "captured", "divergences", "\x1b[2J"]),
    JSON | st.dictionaries(st.text(max_size=4), JSON, max_size=3),
    max_size=4,
)


@given(JSON | st.lists(JSON | REPORTED, max_size=3))
def test_i9_whatever_a_target_reports_of_its_registers_can_be_told(told: object) -> None:
    try:
        notice = Notice.unpack(Notice({"registers": told}).pack())
    except PeerProtocolError:
        return
    verification = {"checked_pages": 1, "scope": "all", "repaired_pages": 0}
    registers = notice.register_reports(2)
    assert len(registers) <= 2
    report = Report(session="0", registers=registers, verification=verification)
    assert all(line.isprintable() for line in report.text().splitlines())


def test_what_a_target_reports_of_its_registers_arrives() -> None:
    report = asdict(RegisterReport("replay", captured=3, divergences={"status": 1}))
    assert Notice({"registers": [report]}).register_reports(1) == [report]


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["ms", "registers", "reason", "guest", "x"]), NESTED))
def test_i9_what_a_peer_says_can_be_computed_with_or_is_refused(said: dict[str, object]) -> None:
    try:
        notice = Notice.unpack(json.dumps(said).encode())
        notice.guest_state()
    except PeerProtocolError:
        return
    stopwatch = Downtime(0.0, 0.0)
    stopwatch.lap("ready", notice.mapping("ms"))
    notice.register_reports(2)
    notice.text("reason")


@pytest.mark.parametrize(
    "number", ["9" * 400, "9" * 5000, "-" + "9" * 30, "1e400", "NaN", "-Infinity", str(1 << 64)]
)
def test_i9_a_number_that_no_field_has_is_refused(number: str) -> None:
    with pytest.raises(PeerProtocolError):
        Notice.unpack(b'{"ms": {"own": %s}}' % number.encode())
    assert Notice.unpack(b'{"ms": {"own": 1.5}}').mapping("ms") == {"own": 1.5}
