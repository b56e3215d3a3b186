"""A profile that comes as a package: `pip install` it on both hosts, and vfio-ferry knows it."""

from importlib.resources import files


def profile() -> str:
    """The profile's text, for the entry point in pyproject.toml."""
    return files(__name__).joinpath("ring_copier.toml").read_text("utf-8")
