"""Who may be at the other end of a link: those who hold the same secret, or one of the keys.

Owns the keys that follow from a secret, and what a socket has to be told of them. Where a secret or
keys come from is the application's business.

CurveZMQ (rfc.zeromq.org/spec/26) encrypts each connection with keys of its own, after both ends
have proven that they have a long-term key. Either each end has a pair of its own and is told the
other's public key (`Keys`); or both pairs are derived from one secret, one for the role of the
sender, one for that of the receiver, so each end knows the other's public key. By itself a server
admits any client that knows the server's key; `transport.session.gatekeeper` sees to it that this
is one of those that it was told.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

SECRET_BYTES = 32
KEY_BYTES = 32
CURVE_PART_BYTES = 33
"""Bytes that encryption adds to each part of a message: command name, nonce, MAC and flags."""
ZAP_DOMAIN = b"vfio-ferry"
"""The name of our sockets in libzmq's question whether a key may connect."""

_PURPOSE = b"vfio-ferry link"
_SENDER = b"sender"
_RECEIVER = b"receiver"


@dataclass(frozen=True, slots=True)
class Keys:
    """An end's secret key, and the public keys of those who may be at the other end; a sender calls
    the one of them that it was told. Keys of Curve25519, 32 bytes each."""

    own: bytes = field(repr=False)
    others: tuple[bytes, ...]


Secret = bytes | Keys
"""What tells an end who may be at the other: 32 bytes that both have, or keys."""


def check_secret(secret: Secret | None) -> None:
    """Raise ValueError unless it is a secret that can be used here, or None."""
    if secret is None:
        return
    if isinstance(secret, Keys):
        if not secret.others or {len(key) for key in (secret.own, *secret.others)} != {KEY_BYTES}:
            raise ValueError(f"keys have {KEY_BYTES} bytes, and one has to be another's")
    elif len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes; it has to have {SECRET_BYTES}")
    if not zmq.has("curve"):
        raise ValueError("this libzmq cannot encrypt: install a binary wheel of pyzmq")


def admit_by(secret: Secret, router: zmq.Socket[bytes]) -> None:
    """Let a bound socket admit those alone who may connect; there has to be a `Gatekeeper`."""
    router.set(zmq.CURVE_SERVER, 1)
    router.set(zmq.CURVE_SECRETKEY, z85.encode(_keys(secret, _RECEIVER, _SENDER).own))
    router.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)


def prove_by(secret: Secret, dealer: zmq.Socket[bytes]) -> None:
    """Let a socket connect to the one alone whom it is told, and prove to that one who we are."""
    keys = _keys(secret, _SENDER, _RECEIVER)
    dealer.set(zmq.CURVE_SERVERKEY, z85.encode(keys.others[0]))
    dealer.set(zmq.CURVE_PUBLICKEY, z85.encode(public_key(keys.own)))
    dealer.set(zmq.CURVE_SECRETKEY, z85.encode(keys.own))


def admitted_keys(secret: Secret) -> frozenset[bytes]:
    """The public keys of those who may connect to a receiver."""
    return frozenset(_keys(secret, _RECEIVER, _SENDER).others)


def public_key(own: bytes) -> bytes:
    """The public key of a secret one."""
    key: bytes = z85.decode(zmq.curve_public(z85.encode(own)))
    return key


def new_key() -> bytes:
    """A secret key that nobody else has."""
    key: bytes = z85.decode(zmq.curve_keypair()[1])
    return key


def _keys(secret: Secret, own: bytes, other: bytes) -> Keys:
    """The keys of an end in the role `own`."""
    if isinstance(secret, Keys):
        return secret
    return Keys(_derived(secret, own), (public_key(_derived(secret, other)),))


def _derived(secret: bytes, role: bytes) -> bytes:
    return hashlib.blake2b(role, key=secret, digest_size=KEY_BYTES, person=_PURPOSE).digest()
