"""What a user of the harness is told when something goes wrong."""

from ferry.errors import Exit, FerryError


class BenchUsageError(FerryError):
    """A name, a setting or a file that the harness cannot do anything with."""

    exit_code = Exit.USAGE


class NeedMissing(FerryError):
    """This machine lacks what a benchmark needs."""

    exit_code = Exit.LOCAL


class BenchmarkFailed(FerryError):
    """What was to be measured did not do what it should, so that its figures would mean nothing."""
