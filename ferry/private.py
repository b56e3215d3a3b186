"""Files that decide who may reach a guest are used only where nobody else may write."""

from collections.abc import Iterable
from pathlib import Path

from ferry.errors import LocalError
from transport.private_path import why_not_private


def check_private(*paths: str | Path) -> None:
    """Raises `LocalError` if somebody else could write to one of `paths`, or replace it."""
    for path in paths:
        if why_not := why_not_private(path):
            raise LocalError(f"{path} is not safe to use: {why_not}")


def check_folders(paths: Iterable[str]) -> None:
    """As `check_private`, for the folders of sockets that another user's process may have made."""
    check_private(*(Path(path).absolute().parent for path in paths))
