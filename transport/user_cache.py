"""Where this user's caches are."""

import os
from pathlib import Path

CACHE_VARIABLE = "VFIO_FERRY_CACHE"


def default_cache() -> Path:
    """$VFIO_FERRY_CACHE, or vfio-ferry in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "vfio-ferry"
