"""Reads a JSON object that came from another host, member by member, each with its bounds."""

from collections.abc import Iterator
from typing import Any

from lab.guest.errors import StreamError

U16 = (1 << 16) - 1
U64 = (1 << 64) - 1


class Fields:
    """The members of one object. Every method raises `StreamError`, which names the member."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise StreamError(f"{where} is no object")
        self._members = value
        self._where = where

    def number(self, name: str, most: int, least: int = 0) -> int:
        value = self._get(name)
        if type(value) is not int or not least <= value <= most:
            raise StreamError(f"{self._where}.{name} is no number from {least} to {most}")
        return value

    def real(self, name: str) -> float:
        """A finite number that is not negative."""
        value = self._get(name)
        if type(value) not in (int, float) or not 0 <= value < 1e18:
            raise StreamError(f"{self._where}.{name} is no positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            raise StreamError(f"{self._where}.{name} is no truth value")
        return value

    def text(self, name: str, most: int = 256) -> str:
        value = self._get(name)
        if not isinstance(value, str) or len(value) > most:
            raise StreamError(f"{self._where}.{name} is no text of up to {most} characters")
        return value

    def object(self, name: str) -> "Fields":
        return Fields(self._get(name), f"{self._where}.{name}")

    def items(self, name: str, most: int) -> list[Any]:
        value = self._get(name)
        if not isinstance(value, list) or len(value) > most:
            raise StreamError(f"{self._where}.{name} is no list of up to {most} items")
        return value

    def objects(self, name: str, most: int) -> Iterator["Fields"]:
        for index, value in enumerate(self.items(name, most)):
            yield Fields(value, f"{self._where}.{name}[{index}]")

    def _get(self, name: str) -> Any:
        if name not in self._members:
            raise StreamError(f"{self._where} has no {name}")
        return self._members[name]
