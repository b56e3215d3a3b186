"""Where this user's caches are."""

import os
from pathlib import Path

CACHE_VARIABLE = "VFIO_FERRY_CACHE"


def default_cache() -> Path:
    """$VFIO_FERRY_CACHE, or vfio-ferry in $XDG_CACHE_HOME or ~/.cache.

    Raises FileNotFoundError for a user without a home.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "vfio-ferry"
    try:
        return Path.home().absolute() / ".cache" / "vfio-ferry"
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no home folder: set ${CACHE_VARIABLE}") from error
