"""The report for people names each part of the downtime by whose it is."""

from ferry.migration.report import Report


def test_the_vmms_phases_are_told_apart_whichever_way_they_are_written() -> None:
    proof = {"checked_pages": 0, "scope": "none", "repaired_pages": 0}
    phases = {"VMM stop": 1.0, "pause": 2.0, "VMM resume": 3.0}
    report = Report(session="s", downtime_ms=phases, verification=proof)
    again = Report(session="s", downtime_ms=report.values()["downtime_ms"], verification=proof)
    for lines in (report.text(), again.text()):
        theirs, ours = (
            next(line for line in lines.splitlines() if line.strip().startswith(name))
            for name in ("VMM:", "vfio-ferry:")
        )
        assert "1.0" in theirs and "3.0" in theirs and "2.0" not in theirs
        assert "2.0" in ours and "1.0" not in ours
