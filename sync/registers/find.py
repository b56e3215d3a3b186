"""Which profile knows the registers of a device.

Owns the search. Profiles come, in this order of preference, from paths that the user gives, from
plug-ins, and from `sync.profiles`; within one origin the narrowest match wins.

A plug-in is an entry point of the group `vfio_ferry.profiles`: a `Profile`, a text in TOML, or a
callable without parameters that returns either.
"""

from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path

from sync.registers.errors import ProfileError
from sync.registers.profile.locate import DeviceView
from sync.registers.profile.model import Profile
from sync.registers.profile.toml import MAX_FILE_BYTES, parse_profile

ENTRY_POINT_GROUP = "vfio_ferry.profiles"

Origin = tuple[Profile, ...]
"""Profiles of equal preference."""


def load_profiles(paths: Sequence[Path] = ()) -> tuple[Origin, ...]:
    """All profiles, by origin, the preferred origin first.

    Each of `paths` is a TOML file or a folder of them. Raises `ProfileError` for a profile that is
    malformed, or a path where none is.
    """
    return (
        *(tuple(_from_path(path)) for path in paths),
        tuple(_from_plugin(point) for point in entry_points(group=ENTRY_POINT_GROUP)),
        tuple(_own()),
    )


def find_profile(view: DeviceView, origins: Iterable[Origin]) -> Profile | None:
    """The profile that is meant for this device, if there is one."""
    for origin in origins:
        fitting = [
            (precision, profile.name, profile)
            for profile in origin
            if (precision := profile.precision(view)) is not None
        ]
        if fitting:
            return max(fitting, key=lambda each: each[:2])[2]
    return None


def _from_path(path: Path) -> list[Profile]:
    try:
        paths = sorted(path.glob("*.toml")) if path.is_dir() else [path]
        profiles = []
        for each in paths:
            if each.stat().st_size > MAX_FILE_BYTES:
                raise ProfileError(f"{each}: larger than {MAX_FILE_BYTES} bytes")
            profiles.append(_parse(str(each), each.read_text("utf-8")))
    except OSError as error:
        raise ProfileError(f"no profile can be read from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"no profile can be read from {path}: {error}") from error
    if not profiles:
        raise ProfileError(f"there is no profile (*.toml) in {path}")
    return profiles


def _from_plugin(point: EntryPoint) -> Profile:
    where = f"the plug-in {point.name} ({point.value})"
    try:
        loaded = point.load()
        if not isinstance(loaded, (Profile, str)) and callable(loaded):
            loaded = loaded()
    except Exception as error:
        raise ProfileError(f"{where} fails: {error!r}") from error
    if isinstance(loaded, str):
        return _parse(where, loaded)
    if not isinstance(loaded, Profile):
        raise ProfileError(f"{where} gives a {type(loaded).__name__}; a profile or TOML is needed")
    return loaded


def _own() -> list[Profile]:
    return [
        _parse(f"sync.profiles/{each.name}", each.read_text("utf-8"))
        for each in sorted(files("sync.profiles").iterdir(), key=lambda each: each.name)
        if each.name.endswith(".toml")
    ]


def _parse(where: str, text: str) -> Profile:
    try:
        return parse_profile(text)
    except ProfileError as error:
        raise ProfileError(f"{where}: {error}") from error
