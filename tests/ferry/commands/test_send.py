"""What `send` says at the end of a migration that went well."""

import json
from io import StringIO

import pytest

from ferry.commands.send import succeed
from ferry.errors import Exit
from ferry.migration.device_watch import DeviceState, Verdict
from ferry.migration.report import Report
from ferry.migration.send_options import Options
from ferry.progress import Reporter


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("downtime_ms", "over"), [(299.0, False), (300.0, False), (345.0, True)])
def test_a_downtime_above_the_limit_is_told(strict: bool, downtime_ms: float, over: bool) -> None:
    stream = StringIO()
    options = Options(to="tcp://192.0.2.7:7100", qmp="q", strict_downtime=strict)
    report = Report("5", downtime_limit_ms=300, downtime_total_ms=downtime_ms)
    told = Reporter("send", as_json=True, stream=stream)
    code = succeed(options, told, report, Verdict(), vmm_ended=False)
    event = json.loads(stream.getvalue())
    assert event["event"] == "success"
    assert event["text"].startswith("The guest runs on 192.0.2.7; the VMM here may be ended.")
    assert ("345 ms" in event["text"]) == over
    assert event["downtime_over_limit"] is over
    assert report.values()["downtime_over_limit"] is over
    assert code == event["exit_code"] == (Exit.SLOW if strict and over else Exit.OK)


@pytest.mark.parametrize("ended", [True, False])
def test_where_a_guest_went_that_is_on_this_host(ended: bool) -> None:
    stream = StringIO()
    options = Options(to="ipc:///run/link.sock", qmp="q", quit_source=True)
    told = Reporter("send", as_json=False, stream=stream)
    succeed(options, told, Report("5"), Verdict(), vmm_ended=ended)
    rest = "has been ended" if ended else "may be ended"
    assert (
        f"The guest runs on the other side of ipc:///run/link.sock; the VMM here {rest}."
        in stream.getvalue()
    )


def test_a_device_that_does_not_work_is_worse_than_a_long_downtime() -> None:
    stream = StringIO()
    options = Options(to="tcp://192.0.2.7:7100", qmp="q", strict_downtime=True)
    report = Report("5", downtime_limit_ms=300, downtime_total_ms=400)
    watched = Verdict(DeviceState.SILENT, "device 1 is gone")
    code = succeed(
        options, Reporter("send", as_json=True, stream=stream), report, watched, vmm_ended=True
    )
    event = json.loads(stream.getvalue())
    assert code == event["exit_code"] == Exit.DEVICE_SILENT
    assert event["devices"] == "silent" and "400 ms" in event["text"]
    assert "BUT A DEVICE DOES NOT WORK there: device 1 is gone. The guest has" in event["text"]


@pytest.mark.parametrize(("form", "repaired"), [("open", 100), ("open", 99), ("closed", 5000)])
def test_many_repairs_where_none_are_expected_are_told(form: str, repaired: int) -> None:
    stream = StringIO()
    options = Options(to="tcp://192.0.2.7:7100", qmp="q")
    report = Report("5", vmm_stream={"form": form}, verification={"repaired_pages": repaired})
    told = Reporter("send", as_json=False, stream=stream)
    assert succeed(options, told, report, Verdict(), vmm_ended=False) is Exit.OK
    assert ("100 pages had to be repaired" in stream.getvalue()) == (repaired == 100)
