"""`vfio-ferry secret`: makes the file that both hosts need to know each other by.

Owns the file: 64 hexadecimal digits, readable by nobody but its owner. What follows from its
content is `transport.session.secret`'s.
"""

import os
import secrets
from dataclasses import dataclass

from ferry.config import option
from ferry.errors import Exit, LocalError
from transport.session.secret import SECRET_BYTES


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
