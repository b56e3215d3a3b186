"""What version this is: of the program, of the source that it was made from, of what it says."""

import importlib
import importlib.metadata
import subprocess
from contextlib import suppress
from pathlib import Path

FORMATS = (
    ("session: greeting, records, tunnel, comparisons", "transport.wire.records.PROTOCOL_VERSION"),
    ("frames of pages", "transport.wire.frames.VERSION"),
    (
        "migration: what `send` and `receive` say to each other",
        "ferry.migration.messages.PROTOCOL_VERSION",
    ),
    ("payloads of register state", "sync.registers.payload.VERSION"),
    ("what the VMM keeps of its devices", "sync.vmm.platform_state._VERSION"),
    (
        "what a gateway hands on to its next version",
        "sync.gateway.engine.inheritance.STATE_VERSION",
    ),
    ("profiles, in TOML", "sync.registers.profile.model.FORMAT"),
)
"""Each format that crosses between hosts, or comes from a user, with the constant that has its
version."""
GIT_S = 5.0


def format_versions() -> dict[str, int]:
    """The present version of each of `FORMATS`."""
    found = {}
    for what, constant in FORMATS:
        module, _, name = constant.rpartition(".")
        found[what] = int(getattr(importlib.import_module(module), name))
    return found


def revision() -> str:
    """The git revision of the source that runs, or '' where it does not run from a checkout."""
    house = Path(__file__).parents[1]
    if not (house / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        words = ["git", "-C", str(house), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=GIT_S, check=True)
        return done.stdout.strip()
    return ""


def version_text() -> str:
    """The program's version, with the revision where it is known."""
    try:
        version = importlib.metadata.version("vfio-ferry")
    except importlib.metadata.PackageNotFoundError:
        version = "of no installed package"
    made_from = revision()
    return f"vfio-ferry {version}" + (f" (revision {made_from})" if made_from else "")
