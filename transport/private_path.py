"""Whether a path is this user's alone: nobody else can write to it, or put something in its place.

The rule is that of sshd's `StrictModes` (auth_secure_path of OpenSSH): the file and each folder
above it belong to this user or to root and are writable by nobody else. A folder with the sticky
bit, as /tmp, may be writable: what another user owns in it cannot be replaced.
"""

import os
import stat
from pathlib import Path


def why_not_private(path: str | Path) -> str:
    """What is wrong with `path`, and what to do; empty where nothing is, or nothing is there yet.

    Raises OSError if it cannot be looked at.
    """
    real = Path(path).resolve()
    for at in (real, *real.parents):
        try:
            status = at.stat()
        except FileNotFoundError:
            continue
        except PermissionError:
            return f"{at} cannot even be looked at: run this as the user whose it is"
        if status.st_uid not in (0, os.geteuid()):
            return f"{at} belongs to another user (uid {status.st_uid}): use a folder of your own"
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & 0o022 and not sticky:
            mode = stat.S_IMODE(status.st_mode)
            return f"others may write to {at} (mode {mode:04o}): chmod go-w {at}"
    return ""
