"""The exit code of a command for each error that it may end with, and the error in one line."""

from ferry.errors import Exit, FerryError

_OURS = frozenset({"ferry", "sync", "transport", "lab", "perf"})


def describe(error: BaseException) -> str:
    """One line for a user: the error's own words, or its class's docstring."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = str(error)
    return text or (type(error).__doc__ or type(error).__name__).splitlines()[0]


def exit_code_of(error: BaseException) -> Exit:
    """The exit code of any error that a command may end with."""
    if isinstance(error, FerryError):
        return error.exit_code
    if isinstance(error, OSError | MemoryError):
        return Exit.LOCAL
    if isinstance(error, ImportError):
        # Somebody else's module: it is not installed, or a library of the system that it needs.
        ours = (error.name or "ferry").partition(".")[0] in _OURS
        return Exit.INTERNAL if ours else Exit.LOCAL
    return Exit[getattr(error, "exit_name", "internal").upper()]
