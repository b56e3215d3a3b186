"""A gateway's records on disk: what survives it, and what is refused rather than guessed."""

import os
from pathlib import Path

import pytest

from sync.gateway.engine import records, records_file
from sync.gateway.engine.custody import Custody, CustodyState
from sync.gateway.engine.records import Fate, Records, Terms
from sync.gateway.engine.records_file import RecordsFile
from sync.gateway.errors import RecordsUnusable

TERMS = Terms(True, "F", "C")


def opened(path: Path) -> tuple[Custody, RecordsFile]:
    file = RecordsFile(path)
    return Custody(Records(lambda: 7.0, file.append, file.records)), file


def let_go(custody: Custody, session: str) -> None:
    custody.vmm_came()
    custody.mediate(session, TERMS)
    custody.stop()
    custody.release(session)


def test_i7_a_gateway_that_starts_anew_stays_shut_until_it_is_told_otherwise(
    tmp_path: Path,
) -> None:
    path = tmp_path / "records"
    custody, file = opened(path)
    let_go(custody, "s")
    file.close()
    custody, file = opened(path)
    custody.vmm_came()
    assert (custody.state, custody.shut) == (CustodyState.RELEASED, True)
    custody.reclaim("s", "fenced:s:F")
    custody.restore()
    assert not custody.shut
    file.close()
    custody, file = opened(path)
    assert custody.state is CustodyState.PASSTHROUGH
    assert custody.record("s").began == 7.0
    file.close()


def test_i7_what_was_not_about_to_run_when_the_gateway_died_is_fenced(tmp_path: Path) -> None:
    for run, proof in ((False, "fenced:s:F"), (True, "committed:s:C")):
        path = tmp_path / str(run)
        custody, file = opened(path)
        custody.vmm_came()
        custody.standby("s", TERMS)
        custody.own("s")
        if run:
            custody.about_to_run()
        file.close()
        custody, file = opened(path)
        assert custody.record("s").proof == proof
        file.close()


def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "records"
    custody, file = opened(path)
    let_go(custody, "s")
    file.close()
    with path.open("ab") as half:
        half.write(b'{"format":1,"sess')
    custody, file = opened(path)
    custody.moved("s")
    file.close()
    custody, file = opened(path)
    assert custody.record("s").fate is Fate.MOVED
    file.close()


@pytest.mark.parametrize("line", [b"nonsense", b'{"format":2}', b"[]", b'{"format":1}'])
def test_what_is_no_record_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "records"
    path.write_bytes(line + b"\n")
    path.chmod(0o600)
    with pytest.raises(RecordsUnusable):
        RecordsFile(path)


def test_records_are_of_one_gateway_and_of_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "records"
    first = RecordsFile(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RecordsUnusable, match="another gateway"):
        RecordsFile(path)
    first.close()
    path.chmod(0o640)
    with pytest.raises(RecordsUnusable, match="chmod"):
        RecordsFile(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError):
        RecordsFile(link)


def test_a_line_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records"
    custody, file = opened(path)
    let_go(custody, "s")
    before = path.read_bytes()

    def fails(number: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        with pytest.raises(OSError):
            file.append(custody.record("s"))
    assert path.read_bytes() == before
    file.append(custody.record("s"))
    file.close()
    RecordsFile(path).close()


def test_a_long_file_is_written_anew_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records"
    custody, file = opened(path)
    for number in range(20):
        let_go(custody, f"s{number}")
        custody.vouch(f"s{number}")
        custody.restore()
    let_go(custody, "last")
    custody.moved("last")
    file.close()
    long = path.stat().st_size
    monkeypatch.setattr(records_file, "COMPACT_BYTES", 100)
    again, file = opened(path)
    assert path.stat().st_size < long / 2
    assert again.records.latest(99) == custody.records.latest(99)
    assert again.records.away == "last"
    again.vouch("last")
    file.close()
    again, file = opened(path)
    assert (again.record("last").fate, again.records.away) == (Fate.VOUCHED, "")
    file.close()


def test_i7_a_guest_that_is_away_is_not_forgotten_however_many_senders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each leaves the record of a session that is fenced."""
    monkeypatch.setattr(records, "MAX_RECORDS", 8)
    monkeypatch.setattr(records_file, "COMPACT_BYTES", 1)
    path = tmp_path / "records"
    custody, file = opened(path)
    let_go(custody, "s")
    for number in range(20):
        custody.fence(f"refused {number}")
    assert len(custody.records.latest(100)) == 8
    assert custody.record("").session == "s"
    for _ in range(2):
        file.close()
        custody, file = opened(path)
        custody.vmm_came()
        assert custody.shut
        assert custody.records.fate("s") is Fate.RELEASED
    custody.moved("s", "committed:s:C")
    for number in range(20):
        custody.fence(f"refused again {number}")
    file.close()
    custody, file = opened(path)
    assert custody.shut
    assert custody.record("s").fate is Fate.MOVED
    file.close()
