"""The file of the secret that two hosts share: read, and refused where others could read it."""

import os
import re
import stat

from ferry.errors import ConfigError, LocalError
from ferry.private import check_private
from transport.session.secret import SECRET_BYTES

MAX_FILE_BYTES = 256


HELP = "file of the secret that both hosts have (`vfio-ferry secret`): admits and hears nobody else"


INSECURE = "use an address of a network without --secret: whoever is on it reads the guest's memory"


def read_secret(path: str | None) -> bytes | None:
    """What is in the file; None without one. Raises `LocalError`, `ConfigError`."""
    if path is None:
        return None
    # Without waiting: it may be a pipe that nobody writes to.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise LocalError(f"{path} is no file")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise LocalError(f"{path} is not its owner's alone (mode {mode:04o}): chmod 600 {path}")
        check_private(path)
        content = file.read(MAX_FILE_BYTES)
    if not re.fullmatch(rb"\s*[0-9a-fA-F]{%d}\s*" % (2 * SECRET_BYTES), content):
        raise ConfigError(
            f"{path} holds no secret, which is {2 * SECRET_BYTES} hexadecimal digits: make one "
            "with `vfio-ferry secret --output FILE`, and copy it to the other host"
        )
    return bytes.fromhex(content.decode())
