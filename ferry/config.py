"""Options of every command: one frozen dataclass each, read from a TOML file and from flags.

A field made by `option` becomes the flag `--field-name` and the key `field-name` in the command's
table of the TOML file given with `--config`; a flag wins over the file. Both go through the same
parser, so that a value is refused with the same words wherever it came from.
"""

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ferry.errors import ConfigError

T = TypeVar("T")

_SIZE = re.compile(r"(\d+)\s*([KMGTkmgt]?)(?:i?B)?")
MAX_SOCKET_PATH_BYTES = 107
"""sun_path of unix(7) has 108 bytes with the NUL."""
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BITS = re.compile(r"(\d+)\s*([KMGTkmgt]?)bit/s")
_BIT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size(text: str) -> int:
    """`64K`, `256MiB`, `4096` as a number of bytes, in steps of 1024. A small b, which means bits
    elsewhere, is refused."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError("bytes, like 4096, 64K, 256MiB or 2G (in steps of 1024)")
    return int(match[1]) * _SIZE_UNITS[match[2].upper()]


def rate(text: str) -> int:
    """Bytes a second, more than 0: a size with or without `/s`, or bits in steps of 1000 as
    `100Mbit/s`."""
    bits = _BITS.fullmatch(text.strip())
    try:
        if bits:
            value = int(bits[1]) * _BIT_UNITS[bits[2].upper()] // 8
        else:
            value = size(text.strip().removesuffix("/s"))
    except ValueError:
        value = 0
    if not value:
        raise ValueError(
            "more than 0 bytes a second, like 100M or 100MiB/s, or bits a second, like 800Mbit/s"
        )
    return value


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


def milliseconds(text: str) -> int:
    """A time of at least 1 ms and at most an hour."""
    if not text.isdecimal() or not 1 <= int(text) <= 3600_000:
        raise ValueError("a whole number of milliseconds, from 1 to 3600000")
    return int(text)


def port(text: str) -> int:
    """A TCP port of one's own choice."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError("a port from 1 to 65535")
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


def window(text: str) -> float:
    """A time of at most an hour; 0 is none at all."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise ValueError("a number of seconds from 0 to 3600")
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
    match = re.fullmatch(r"tcp://([^/\s]+):(\d{1,5})|ipc:///\S+", text)
    if not match or (match[2] and int(match[2]) > 65535) or not _is_host(match[1] or "localhost"):
        raise ValueError(
            "an endpoint like tcp://HOST:PORT, tcp://[IPV6]:PORT or ipc:///run/ferry.sock"
        )
    return text


def _is_host(text: str) -> bool:
    """Whether it is a name, an address, or an IPv6 address in brackets as URLs have it."""
    if text.startswith("["):
        with contextlib.suppress(ValueError):
            return text.endswith("]") and bool(IPv6Address(text[1:-1]))
        return False
    return not re.search(r"[\[\]:@]", text)


def socket_path(text: str) -> str:
    """A path, absolute, for the process that it is handed to may be in another folder. A relative
    one that would then be too long for a socket stays as it is.

    Raises `ValueError` for one that is empty or too long anyway.
    """
    absolute = os.path.normpath(Path.cwd() / text) if text else ""
    path = absolute if len(os.fsencode(absolute)) <= MAX_SOCKET_PATH_BYTES else text
    if not 0 < len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"the path of a socket, of at most {MAX_SOCKET_PATH_BYTES} bytes")
    return path


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    parse: Callable[[str], Any] = str,
    choices: Sequence[str] = (),
    repeat: bool = False,
    positional: bool = False,
) -> Any:
    """A field of an options dataclass, which becomes a flag and a key. Without a `default` it has
    to be given; `repeat` makes it a tuple; a default of `False` makes it a switch; `positional`
    takes its value without a flag."""
    metadata = {
        "help": help,
        "parse": parse,
        "choices": tuple(choices),
        "repeat": repeat,
        "positional": positional,
    }
    return dataclasses.field(default=default, metadata=metadata)


_UNITS = {
    "size": "BYTES",
    "log_page": "BYTES",
    "journal_bytes": "BYTES",
    "rate": "BYTES/s",
    "seconds": "SECONDS",
    "milliseconds": "MS",
}


def flag_of(field: "dataclasses.Field[Any]") -> str:
    if field.metadata["positional"]:
        return field.name.upper()
    return "--" + field.name.replace("_", "-")


def default_text(field: "dataclasses.Field[Any]") -> str:
    """The default of an option as a user would write it; empty where there is none to name."""
    value = field.default
    if value is dataclasses.MISSING or value in (None, False, "", ()):
        return ""
    if _UNITS.get(field.metadata["parse"].__name__, "").startswith("BYTES"):
        for unit in ("T", "G", "M", "K"):
            if value % _SIZE_UNITS[unit] == 0:
                return f"{value // _SIZE_UNITS[unit]}{unit}"
    return str(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence's end that names what is most like `word`, or all of `known`."""
    known = sorted(known)
    found = difflib.get_close_matches(word, known, 1, 0.6)
    return f"did you mean {found[0]!r}?" if found else f"it knows {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are a `ConfigError`, as those of a file are, and name the option
    that was meant."""

    def error(self, message: str) -> NoReturn:
        for word in re.findall(r"(?<=unrecognized arguments: )--[^\s=]+", message):
            found = difflib.get_close_matches(word, self.flags, 1, 0.6)
            message += f"; did you mean {found[0]}?" if found else ""
        raise ConfigError(f"{message}; see: {self.prog} --help")

    flags: Sequence[str] = ()
    """What may have been meant, of all that is parsed here."""


def add_arguments(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Adds a flag for each field of `options`, and `--config`."""
    parser.add_argument("--config", metavar="FILE", help="read options from this TOML file")
    for field in dataclasses.fields(options):
        meta = field.metadata
        text = meta["help"]
        required = field.default is dataclasses.MISSING
        if default_text(field):
            text += f" (default: {default_text(field)})"
        if field.default is False:
            parser.add_argument(
                flag_of(field), action="store_true", default=argparse.SUPPRESS, help=text
            )
            continue
        if meta["positional"]:
            parser.add_argument(
                field.name, nargs="?", default=argparse.SUPPRESS, metavar=flag_of(field), help=text
            )
            continue
        parser.add_argument(
            flag_of(field),
            action="append" if meta["repeat"] else "store",
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(filter(None, meta["choices"])) + "}"
            if meta["choices"]
            else _UNITS.get(meta["parse"].__name__, field.name.rsplit("_", 1)[-1].upper()),
            help=(text + (" (required)" if required else "")).replace("%", "%%"),
        )


def load(
    options: type[T], command: str, arguments: argparse.Namespace, tables: Iterable[str] = ()
) -> T:
    """The options of `command`: its defaults, the file's values over them, the flags over both.
    `tables` are the other commands, whose options may stand in the same file.

    Raises `ConfigError` naming the flag or key, what it holds, and what it may hold.
    """
    given = vars(arguments)
    from_file = _read_table(given.get("config"), command, {command, *tables})
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    unknown = [key for key in from_file if key.replace("-", "_") not in fields]
    if unknown:
        hint = nearest(unknown[0], (name.replace("_", "-") for name in fields))
        raise ConfigError(f"[{command}] has no key {unknown[0]!r}; {hint}")
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


def _read_table(path: str | None, command: str, tables: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for name in document.keys() - tables:
        raise ConfigError(f"{path} has a table [{name}] of no command; {nearest(name, tables)}")
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
        values = tuple(_single(meta, item, where) for item in items)
        for again in (each for number, each in enumerate(values) if each in values[:number]):
            raise ConfigError(f"{where} names {again!r} twice")
        return values
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
