"""`vfio-ferry secret`: makes the file that both hosts need to know each other by.

Owns the file: 64 hexadecimal digits, readable by nobody but its owner. What follows from its
content is `transport.secret`'s.
"""

import os
import re
import secrets
import stat
from dataclasses import dataclass

from ferry.config import option
from ferry.errors import ConfigError, Exit, LocalError
from transport.secret import SECRET_BYTES

MAX_FILE_BYTES = 256
HELP = "file of the secret that both hosts have (`vfio-ferry secret`): admits and hears nobody else"


@dataclass(frozen=True, kw_only=True)
class Options:
    output: str = option("the file to make; there must be none yet")


def run(options: Options) -> int:
    """Makes the file; returns the exit code."""
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(options.output, flags, 0o600), "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
    except FileExistsError:
        raise LocalError(f"{options.output} exists already, and is not written over") from None
    print(f"{options.output} is made; copy it to the other host, over a channel that is secure")
    return Exit.OK


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
        content = file.read(MAX_FILE_BYTES)
    if not re.fullmatch(rb"\s*[0-9a-fA-F]{%d}\s*" % (2 * SECRET_BYTES), content):
        raise ConfigError(
            f"{path} holds no secret, which is {2 * SECRET_BYTES} hexadecimal digits: make one "
            "with `vfio-ferry secret --output FILE`, and copy it to the other host"
        )
    return bytes.fromhex(content.decode())
