"""A gateway's records on disk: a file of one JSON object a line, each written before it counts.

Owned here: the file, its lock and its permissions. What a record means is `records`'.

The latest line of a session is its record. A line is on the disk when `append` returns, so it is
there after a loss of power too. What a death left half written at the end is dropped; anything else
that is no record is an error, for a guest's owner must not be guessed.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sync.gateway.engine.records import MAX_RECORDS, Fate, Records, SessionRecord, Terms
from sync.gateway.errors import RecordsUnusable

FORMAT = 1
COMPACT_BYTES = 1 << 20
"""A file that has become as large is written anew with the latest line of each session."""


class RecordsFile:
    """Opens and locks the file at `path`, which is made for its user alone (0600) if need be.

    Raises `RecordsUnusable` if somebody else may write it or has it open, or if it does not parse;
    OSError if it cannot be opened.
    """

    def __init__(self, path: Path, handed_on: int = -1) -> None:
        """`handed_on`: the file, open and locked, of a process that may still go on with it."""
        self._path = path
        self._file = handed_on
        try:
            if handed_on < 0:
                self._file = _open(path)
            self.records = _read(path, self._file)
            if handed_on < 0 and os.fstat(self._file).st_size > COMPACT_BYTES:
                self._compact()
        except BaseException:
            self.close()
            raise
        self._end = os.lseek(self._file, 0, os.SEEK_END)

    def fileno(self) -> int:
        return self._file

    def append(self, record: SessionRecord) -> None:
        """Returns when the record is on the disk. Raises OSError; the file is then as before."""
        try:
            _write(self._file, _line(record))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end = os.lseek(self._file, 0, os.SEEK_END)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _compact(self) -> None:
        state = Records(kept=self.records)
        kept = state.latest(MAX_RECORDS)
        if away := state.find(state.away):
            # Last, and beginning with the line that says so: the guest is away since then.
            kept.remove(away)
            kept += [dataclasses.replace(away, fate=Fate.RELEASED), away]
        beside = self._path.with_name(f"{self._path.name}.new")
        beside.unlink(missing_ok=True)
        new = _open(beside)
        try:
            _write(new, b"".join(map(_line, kept)))
            beside.rename(self._path)
        except BaseException:
            os.close(new)
            raise
        os.close(self._file)
        self._file = new
        _sync_folder(self._path)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(path, flags, 0o600)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise RecordsUnusable(f"{path} is no file of this user: choose another --records")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH | stat.S_IRGRP | stat.S_IROTH):
            raise RecordsUnusable(f"others may use {path}: chmod 600 {path}")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordsUnusable(
                f"another gateway keeps its records in {path}: give each its own --records"
            ) from None
        if not status.st_size:
            _sync_folder(path)
    except BaseException:
        os.close(file)
        raise
    return file


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    os.fdatasync(file)


def _read(path: Path, file: int) -> list[SessionRecord]:
    size = os.fstat(file).st_size
    whole, _, torn = os.pread(file, size, 0).rpartition(b"\n")
    if torn:
        os.ftruncate(file, size - len(torn))
    try:
        return list(_parse(whole.splitlines()))
    except (ValueError, KeyError, TypeError) as error:
        raise RecordsUnusable(
            f"{path} does not hold what a gateway of this release wrote ({error}): whose the guest "
            "is can no longer be told from it; move it away only if you know"
        ) from error


def _parse(lines: Iterable[bytes]) -> Iterable[SessionRecord]:
    for line in lines:
        values: dict[str, Any] = json.loads(line)
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        terms = Terms(**values.pop("terms"))
        yield SessionRecord(terms=terms, fate=Fate(values.pop("fate")), **values)


def _line(record: SessionRecord) -> bytes:
    values = {"format": FORMAT, **dataclasses.asdict(record)}
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"
