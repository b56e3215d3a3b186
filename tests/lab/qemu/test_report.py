import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.qemu.errors import GuestReportError
from lab.qemu.report import GuestEvent, GuestReport, ReportReader, parse_line

LOG = b"""\
\x1bc firmware chatter
FERRY boot kernel=6.12.107+deb13-amd64
FERRY ready
FERRY beat n=1 reads=3 writes=0 inflight=0
FERRY load disk=vda workers=4
FERRY beat n=2 reads=49 writes=96 inflight=5
FERRY error what=direct-checksum detail=vda-job-3
FERRY beat n=3 reads=82 writes=191 inflight=3
FERRY job what=direct disk=vda passes=6
FERRY job what=direct disk=vdb passes=5
FERRY job what=cached disk=vda passes=2
FERRY disk longest_io_us=32269 depth=4 interrupts=msix
FERRY net way=down sha=c0ffee
FERRY dmesg io_error=0 reset=1 hung=0 warning=0 interrupt=0 network=1 lines=3
FERRY end errors=1
"""


def sum_of(events: list[GuestEvent]) -> GuestReport:
    report = GuestReport()
    for event in events:
        report.add(event)
    return report


def test_a_whole_log() -> None:
    report = sum_of(ReportReader().feed(LOG))
    assert (report.beats, report.reads, report.writes) == (3, 82, 191)
    assert report.passes == {"direct": 11, "cached": 2}
    assert (report.longest_io_us, report.queue_depth) == (32269, 4)
    assert report.interrupts == "msix"
    assert report.streams == {"down": "c0ffee"}
    assert report.complaints() == ["direct-checksum vda-job-3", "dmesg: reset", "dmesg: network"]
    assert report.ended


@given(st.lists(st.integers(0, len(LOG)), max_size=20))
def test_a_log_may_arrive_in_any_pieces(cuts: list[int]) -> None:
    reader = ReportReader()
    edges = [0, *sorted(cuts), len(LOG)]
    events = []
    for start, end in itertools.pairwise(edges):
        events += reader.feed(LOG[start:end])
    assert events == ReportReader().feed(LOG)


def test_a_line_without_an_end_is_no_event_yet() -> None:
    reader = ReportReader()
    assert reader.feed(b"FERRY en") == []
    assert reader.feed(b"d errors=0\n") == [GuestEvent("end", {"errors": "0"})]


@pytest.mark.parametrize(
    "line", [b"FERRY", b"FERRY n=1", b"FERRY beat n", b"FERRY beat =1", b"FERRY Beat \xff"]
)
def test_nonsense_is_refused(line: bytes) -> None:
    with pytest.raises(GuestReportError):
        parse_line(line)


@given(st.binary(max_size=200))
def test_bytes_end_in_events_or_in_the_typed_error(data: bytes) -> None:
    for prefix in (b"", b"FERRY beat ", b"FERRY "):
        try:
            events = ReportReader().feed(prefix + data + b"\n")
            sum_of(events)
        except GuestReportError:
            pass


def test_an_endless_line_is_refused() -> None:
    reader = ReportReader()
    with pytest.raises(GuestReportError, match="without an end"):
        for _ in range(10):
            reader.feed(b"x" * 1000)


@pytest.mark.parametrize("longest", ["unknown", str((1 << 64) - 180_000)])
def test_an_unmeasured_value_stays_unknown(longest: str) -> None:
    """Nor is it known when the guest's clock went back while the request was under way."""
    line = f"FERRY disk longest_io_us={longest} depth=unknown interrupts=intx\n"
    report = sum_of(ReportReader().feed(line.encode()))
    assert report == GuestReport(interrupts="intx", stages={"disk"})
