"""How an object becomes a control message and back, and what is checked on the way in.

A *shape* is a dataclass or a NamedTuple; its annotations say what each field may be, and are all
that either end knows of it. `Annotated` adds bounds to a type, or says that a field does not travel
in the JSON object: one field of a shape may be the message's blob, one its descriptors.

    bool, int, float, str       as in JSON; an int is no bool, a float may be written as an int
    bytes                       hexadecimal digits
    Literal, an Enum            one of its values
    X | None, tuple, dict       null, a list, an object (an int as a key is written in digits)
    a dataclass                 an object with its fields

A field without a default has to be there, one that the shape does not have must not be.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from sync.gateway.control.wire import ControlMessage

T = TypeVar("T")

_KEY_DIGITS = 20


class Bound(Protocol):
    """What a value has to be beside being of its type; `str` of it completes "has to be"."""

    def admits(self, value: Any) -> bool: ...


@dataclass(frozen=True, slots=True)
class Range:
    """A number from `low` to `high`."""

    low: float
    high: float

    def admits(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a number from {self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """A power of two up to `high`."""

    high: int

    def admits(self, value: int) -> bool:
        return 1 <= value <= self.high and value.bit_count() == 1

    def __str__(self) -> str:
        return f"a power of two up to {self.high}"


@dataclass(frozen=True, slots=True)
class AtMost:
    """A list of at most so many values."""

    count: int

    def admits(self, value: tuple[Any, ...]) -> bool:
        return len(value) <= self.count

    def __str__(self) -> str:
        return f"at most {self.count} values"


@dataclass(frozen=True, slots=True)
class Text:
    """Text that a path or a name may be: no NUL, at most so many characters."""

    max_characters: int

    def admits(self, value: str) -> bool:
        return len(value) <= self.max_characters and "\0" not in value

    def __str__(self) -> str:
        return f"text of at most {self.max_characters} characters"


@dataclass(frozen=True, slots=True)
class Matching:
    """Text that the whole of `pattern` matches; `words` says what that is."""

    pattern: re.Pattern[str]
    words: str

    def admits(self, value: str) -> bool:
        return self.pattern.fullmatch(value) is not None

    def __str__(self) -> str:
        return self.words


class Part(Enum):
    """A field that stands beside the JSON object."""

    BLOB = "blob"
    DESCRIPTORS = "descriptors"


class ShapeError(ValueError):
    """A message is not of the shape that it should have."""


class _Layout(NamedTuple):
    """A shape, taken apart. `blob` and `descriptors` are names of fields or ''."""

    hints: Mapping[str, Any]
    """Of the fields in the JSON object."""
    required: frozenset[str]
    blob: str
    descriptors: str


@cache
def _layout(shape: Any) -> _Layout:
    hints = get_type_hints(shape, include_extras=True)
    hints = {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
    beside = {
        part: name
        for name, hint in hints.items()
        for part in get_args(hint)
        if isinstance(part, Part)
    }
    for name in beside.values():
        del hints[name]
    parameters = inspect.signature(shape).parameters
    required = {name for name in hints if parameters[name].default is inspect.Parameter.empty}
    return _Layout(
        hints,
        frozenset(required),
        blob=beside.get(Part.BLOB, ""),
        descriptors=beside.get(Part.DESCRIPTORS, ""),
    )


def pack(value: Any, **more: object) -> ControlMessage:
    """The message that carries `value`, and `more` in its JSON object."""
    shape: Any = type(value)
    layout = _layout(shape)
    fields = {name: getattr(value, name) for name in layout.hints}
    return ControlMessage(
        {**more, **fields},
        getattr(value, layout.blob) if layout.blob else b"",
        list(getattr(value, layout.descriptors)) if layout.descriptors else [],
    )


def unpack(shape: Callable[..., T], message: ControlMessage, *ignored: str) -> T:
    """The object that `message` carries beside the fields `ignored`; it owns the descriptors.

    Raises `ShapeError`; the descriptors are the caller's then.
    """
    layout = _layout(shape)
    fields = {name: value for name, value in message.fields.items() if name not in ignored}
    values = _parse_fields(layout, fields)
    if layout.blob:
        values[layout.blob] = message.blob
    elif message.blob:
        raise ShapeError(f"a blob of {len(message.blob)} bytes comes where none belongs")
    if layout.descriptors:
        values[layout.descriptors] = tuple(message.descriptors)
    elif message.descriptors:
        raise ShapeError(f"{len(message.descriptors)} descriptors come where none belong")
    return shape(**values)


def _parse_fields(layout: _Layout, fields: Mapping[str, object]) -> dict[str, Any]:
    for name in layout.required - fields.keys():
        raise ShapeError(f"{name!r} is missing")
    for name in fields.keys() - layout.hints.keys():
        raise ShapeError(f"{name!r} is unknown")
    return {name: _parse(layout.hints[name], value, name) for name, value in fields.items()}


def _parse(hint: Any, value: Any, name: str) -> Any:
    """`value` as what `hint` says; `name` is the field in which it stands."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        parsed = _parse(arguments[0], value, name)
        for bound in arguments[1:]:
            if not bound.admits(parsed):
                raise ShapeError(f"{name!r} has to be {bound}")
        return parsed
    if origin is UnionType:
        return None if value is None else _parse(arguments[0], value, name)
    if origin is Literal:
        if type(value) is str and value in arguments:
            return value
        raise ShapeError(f"{name!r} has to be one of {', '.join(arguments)}")
    if origin is tuple:
        return _parse_tuple(arguments, value, name)
    if origin is dict and type(value) is dict:
        return {
            _parse_key(arguments[0], key, name): _parse(arguments[1], item, name)
            for key, item in value.items()
        }
    if isinstance(hint, type) and is_dataclass(hint) and type(value) is dict:
        return hint(**_parse_fields(_layout(hint), value))
    if hint is bytes and type(value) is str:
        try:
            return bytes.fromhex(value)
        except ValueError:
            raise ShapeError(f"{name!r} has to be hexadecimal digits") from None
    if isinstance(hint, type) and issubclass(hint, Enum) and type(value) in (int, str):
        if value in [each.value for each in hint]:
            return hint(value)
        raise ShapeError(f"{name!r} has to be one of {', '.join(str(each.value) for each in hint)}")
    if hint is float and type(value) is int:
        # A number that no float can hold is out of every bound.
        return value
    if hint in (bool, int, float, str) and type(value) is hint:
        return value
    raise ShapeError(f"{name!r} has to be of type {getattr(hint, '__name__', hint)}")


def _parse_key(hint: Any, key: str, name: str) -> Any:
    if hint is not int:
        return _parse(hint, key, name)
    if not key.isdecimal() or len(key) > _KEY_DIGITS:
        raise ShapeError(f"{name!r} has to have numbers as its keys")
    return int(key)


def _parse_tuple(hints: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if type(value) is not list:
        raise ShapeError(f"{name!r} has to be a list")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(hints) != len(value):
        raise ShapeError(f"{name!r} has to be lists of {len(hints)} values")
    return tuple(_parse(hint, item, name) for hint, item in zip(hints, value, strict=True))
