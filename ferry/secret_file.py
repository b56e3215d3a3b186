"""The files by which two hosts know each other: a shared secret, or a key pair for each and a list
of those who are authorized. Read, and refused where others could use or change them.

A secret is 64 hexadecimal digits. An identity is the word `identity` and 64 digits, the secret key.
A line of a list is a public key of 64 digits and the name of its host; `#` begins a comment.
"""

import os
import re
import stat
from dataclasses import dataclass
from urllib.parse import urlsplit

from ferry.errors import ConfigError, LocalError
from ferry.private import check_private
from transport.session.secret import SECRET_BYTES, Keys, Secret

MAX_FILE_BYTES = 256
MAX_LIST_BYTES = 1 << 20
IDENTITY = "identity"
"""The word in front of a secret key: so neither file passes for the other."""

HELP = "file of the secret that both hosts have (`vfio-ferry secret`): admits and hears nobody else"
IDENTITY_HELP = "file of this host's own key (`vfio-ferry secret --identity`), in place of --secret"
AUTHORIZED_HELP = (
    "file of the public keys of the hosts that may be at the other end, each with its host's name"
)
INSECURE = (
    "use an address of a network without --secret or --identity: whoever is on it reads the "
    "guest's memory"
)


@dataclass(frozen=True)
class Trust:
    """What a command was told of who may be at the other end; `insecure`: anybody."""

    secret: str | None = None
    identity: str | None = None
    authorized: str | None = None
    insecure: bool = False

    def check(self, flag: str, url: str) -> None:
        """Raises `ConfigError` for words that exclude each other."""
        ways = (self.secret, self.identity, self.insecure or None)
        if sum(way is not None for way in ways) > 1:
            raise ConfigError("--secret, --identity and --insecure exclude each other")
        if (self.identity is None) != (self.authorized is None):
            raise ConfigError("--identity and --authorized belong together")
        if not any(ways) and not is_of_this_host(url):
            raise ConfigError(
                f"{flag} {url} is an address of a network, and the guest's memory would cross it "
                "as it is: make a secret with `vfio-ferry secret --output FILE`, give it to both "
                "sides with --secret FILE, or say --insecure on both; --identity is "
                "for a key of each host"
            )

    def of_receiver(self, url: str) -> Secret | None:
        """What admits senders at `url`. Raises `ConfigError`, `LocalError`."""
        self.check("--listen", url)
        if self.identity is None or self.authorized is None:
            return read_secret(self.secret)
        authorized = read_authorized(self.authorized)
        return Keys(read_identity(self.identity), tuple(key for key, _ in authorized))

    def of_sender(self, url: str) -> Secret | None:
        """What proves us to the receiver at `url`, and it to us. Raises `ConfigError`,
        `LocalError`."""
        self.check("--to", url)
        if self.identity is None or self.authorized is None:
            return read_secret(self.secret)
        authorized = read_authorized(self.authorized)
        host = urlsplit(url).hostname
        keys = {key for key, name in authorized if name.lower() == host}
        if not keys and len(authorized) == 1:
            keys = {authorized[0][0]}
        if len(keys) != 1:
            which = "several keys" if keys else "no key"
            raise ConfigError(
                f"{self.authorized} has {which} for {host or url}: each line is a public key and "
                "the host as it stands in --to; one line alone is for any host"
            )
        return Keys(read_identity(self.identity), tuple(keys))


def is_of_this_host(url: str) -> bool:
    """Whether nobody on another host can be at the other end."""
    host = urlsplit(url).hostname
    return host is None or host in ("localhost", "::1") or host.startswith("127.")


def read_secret(path: str | None) -> bytes | None:
    """The secret in the file; None without one. Raises `LocalError`, `ConfigError`."""
    if path is None:
        return None
    digits = re.fullmatch(rb"\s*([0-9a-fA-F]{%d})\s*" % (2 * SECRET_BYTES), _read_own(path))
    if not digits:
        raise ConfigError(
            f"{path} holds no secret, which is {2 * SECRET_BYTES} hexadecimal digits: make one "
            "with `vfio-ferry secret --output FILE`, and copy it to the other host"
        )
    return bytes.fromhex(digits[1].decode())


def read_identity(path: str) -> bytes:
    """The secret key in the file. Raises `LocalError`, `ConfigError`."""
    pattern = rb"\s*%s\s+([0-9a-fA-F]{64})\s*" % IDENTITY.encode()
    digits = re.fullmatch(pattern, _read_own(path))
    if not digits:
        raise ConfigError(
            f"{path} holds no identity: make one with `vfio-ferry secret --identity FILE`"
        )
    return bytes.fromhex(digits[1].decode())


def read_authorized(path: str) -> list[tuple[bytes, str]]:
    """The public keys in the file, each with the name of its host. Everybody may read it, nobody
    else may write to it. Raises `LocalError`, `ConfigError`."""
    check_private(path)
    found = []
    for number, line in enumerate(_read(path, MAX_LIST_BYTES).decode(errors="replace").split("\n")):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
            raise ConfigError(
                f"{path}, line {number + 1}: not a public key of 64 hexadecimal digits and the "
                "name of its host, as `vfio-ferry secret --identity FILE` writes into FILE.pub"
            )
        found.append((bytes.fromhex(words[0]), words[1]))
    if not found:
        raise ConfigError(f"{path} authorizes nobody: add the other host's FILE.pub to it")
    return found


def _read_own(path: str) -> bytes:
    """What is in a file that nobody else may read."""
    content = _read(path, MAX_FILE_BYTES, owners_alone=True)
    check_private(path)
    return content


def _read(path: str, max_bytes: int, *, owners_alone: bool = False) -> bytes:
    # Without waiting: it may be a pipe that nobody writes to.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise LocalError(f"{path} is no file")
        if owners_alone and status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise LocalError(f"{path} is not its owner's alone (mode {mode:04o}): chmod 600 {path}")
        return file.read(max_bytes)
