"""`vfio-ferry secret`: makes the files by which hosts know each other.

Owns making them: a secret that two hosts share, or this host's key pair. What the files hold stands
in `ferry.secret_file`, what follows from it in `transport.session.secret`.
"""

import os
import secrets
import socket
from dataclasses import dataclass

from ferry.config import option
from ferry.errors import ConfigError, Exit, LocalError
from ferry.secret_file import IDENTITY
from transport.session.secret import SECRET_BYTES, new_key, public_key


@dataclass(frozen=True, kw_only=True)
class Options:
    output: str | None = option(
        "make a secret that hosts share: the file; there must be none", None
    )
    identity: str | None = option(
        "make a key of this host's own: the file, and FILE.pub for the others; there must be none",
        None,
    )
    host: str | None = option(
        "with --identity, how --to of the others names this host; by default its host name", None
    )


def run(options: Options) -> int:
    """Makes the files; returns the exit code."""
    if options.output is not None and options.identity is None:
        _make(options.output, secrets.token_hex(SECRET_BYTES), 0o600)
        print(f"{options.output} is made; copy it to the other host, over a channel that is secure")
    elif options.identity is not None and options.output is None:
        host = options.host or socket.gethostname()
        if len(host.split()) != 1 or "#" in host:
            raise ConfigError(f"--host is {host!r}; it has to be one word, as --to has it")
        own = new_key()
        line = f"{public_key(own).hex()} {host}"
        public = f"{options.identity}.pub"
        _make(public, line, 0o644)
        _make(options.identity, f"{IDENTITY} {own.hex()}", 0o600)
        print(
            f"{options.identity} is made and stays on this host; its public key is in {public}. On "
            f"each host that may migrate to or from here, add this line to the file of its "
            f"--authorized:\n{line}"
        )
    else:
        raise ConfigError("give --output FILE, or --identity FILE; see: vfio-ferry secret --help")
    return Exit.OK


def _make(path: str, content: str, mode: int) -> None:
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(path, flags, mode), "w") as file:
            file.write(content + "\n")
    except FileExistsError:
        raise LocalError(f"{path} exists already, and is not written over") from None
