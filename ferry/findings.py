"""What the doctor and a check find: one judgement on one thing, with what to do about it."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Worth knowing; a migration is possible all the same."""
    PROBLEM = "problem"
    """A migration is not possible like this."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One judgement: `check` names what was looked at, `text` says what was seen, `advice` what to
    do about it, if anything."""

    level: Level
    check: str
    text: str
    advice: str = ""


def methods_text(registers: str, dirty: str) -> str:
    """By which methods a device moves, in words."""
    return f"registers by {registers}, dirty pages by {dirty}"


def ok(check: str, text: str) -> Finding:
    return Finding(Level.OK, check, text)


def note(check: str, text: str, advice: str = "") -> Finding:
    return Finding(Level.NOTE, check, text, advice)


def problem(check: str, text: str, advice: str = "") -> Finding:
    return Finding(Level.PROBLEM, check, text, advice)
