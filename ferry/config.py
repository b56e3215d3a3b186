"""Options of every command: one frozen dataclass each, read from a TOML file and from flags.

A field made by `option` becomes the flag `--field-name` and the key `field-name` in the command's
table of the TOML file given with `--config`; a flag wins over the file. Both go through the same
parser, so that a value is refused with the same words wherever it came from.
"""

import argparse
import dataclasses
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ferry.errors import ConfigError

T = TypeVar("T")

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """`64K`, `256MiB`, `4096` as a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError("a size like 4096, 64K, 256M or 2G")
    return int(match[1]) * _SIZE_UNITS[match[2].upper()]


def log_page(text: str) -> int:
    """A page size that DMA logging can have, in bytes."""
    found = size(text)
    if not 4096 <= found <= 2 << 20 or found & (found - 1):
        raise ValueError("a power of two from 4K to 2M")
    return found


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise ValueError("a whole number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    """A time of more than 0 seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise ValueError("a number of seconds greater than 0")
    return value


def share(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError("a number between 0 and 1")
    return value


def endpoint(text: str) -> str:
    """An address for the link: `tcp://HOST:PORT` or `ipc://` and an absolute path."""
    match = re.fullmatch(r"tcp://[^/\s]+:(\d{1,5})|ipc:///\S+", text)
    if not match or (match[1] and int(match[1]) > 65535):
        raise ValueError("an endpoint like tcp://HOST:PORT or ipc:///run/ferry.sock")
    return text


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    parse: Callable[[str], Any] = str,
    choices: Sequence[str] = (),
    repeat: bool = False,
) -> Any:
    """A field of an options dataclass, which becomes a flag and a key. Without a `default` it has
    to be given; `repeat` makes it a tuple; a default of `False` makes it a switch."""
    metadata = {"help": help, "parse": parse, "choices": tuple(choices), "repeat": repeat}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: "dataclasses.Field[Any]") -> str:
    return "--" + field.name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Adds a flag for each field of `options`, and `--config`."""
    parser.add_argument("--config", metavar="FILE", help="read options from this TOML file")
    for field in dataclasses.fields(options):
        meta = field.metadata
        text = meta["help"]
        required = field.default is dataclasses.MISSING
        if field.default not in (dataclasses.MISSING, None, False, ()):
            text += f" (default: {field.default})"
        if field.default is False:
            parser.add_argument(
                flag_of(field), action="store_true", default=argparse.SUPPRESS, help=text
            )
            continue
        parser.add_argument(
            flag_of(field),
            action="append" if meta["repeat"] else "store",
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(filter(None, meta["choices"])) + "}"
            if meta["choices"]
            else field.name.rsplit("_", 1)[-1].upper(),
            help=text + (" (required)" if required else ""),
        )


def load(options: type[T], command: str, arguments: argparse.Namespace) -> T:
    """The options of `command`: its defaults, the file's values over them, the flags over both.

    Raises `ConfigError` naming the flag or key, what it holds, and what it may hold.
    """
    given = vars(arguments)
    from_file = _read_table(given.get("config"), command)
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    unknown = [key for key in from_file if key.replace("-", "_") not in fields]
    if unknown:
        known = ", ".join(sorted(name.replace("_", "-") for name in fields))
        raise ConfigError(f"[{command}] has no key {unknown[0]!r}; it knows {known}")
    values: dict[str, Any] = {}
    for key, raw in from_file.items():
        name = key.replace("-", "_")
        values[name] = _value(fields[name], raw, f"{key} in [{command}]")
    for name, field in fields.items():
        if name in given:
            values[name] = _value(field, given[name], flag_of(field))
        elif name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"{flag_of(field)} is missing; see: vfio-ferry {command} --help")
    return options(**values)


def _read_table(path: str | None, command: str) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    table = document.get(command, {})
    if not isinstance(table, dict):
        raise ConfigError(f"[{command}] in {path} has to be a table")
    return table


def _value(field: "dataclasses.Field[Any]", raw: Any, where: str) -> Any:
    meta = field.metadata
    if field.default is False:
        if not isinstance(raw, bool):
            raise ConfigError(f"{where} is {raw!r}; it has to be true or false")
        return raw
    if meta["repeat"]:
        items = raw if isinstance(raw, list) else [raw]
        return tuple(_single(meta, item, where) for item in items)
    return _single(meta, raw, where)


def _single(meta: Any, raw: Any, where: str) -> Any:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ConfigError(f"{where} is {raw!r}; it has to be a string or a number")
    text = str(raw)
    if meta["choices"] and text not in meta["choices"]:
        raise ConfigError(
            f"{where} is {text!r}; it has to be one of {', '.join(filter(None, meta['choices']))}"
        )
    try:
        return meta["parse"](text)
    except ValueError as error:
        raise ConfigError(f"{where} is {text!r}; it has to be {error}") from error
