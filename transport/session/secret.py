"""Who may be at the other end of a link: those who hold the same secret.

Owns the keys that follow from a secret, and what a socket has to be told of them. Where a secret
comes from is the application's business.

CurveZMQ (rfc.zeromq.org/spec/26) encrypts each connection with keys of its own, after both ends
have proven that they have a long-term key. Both pairs of these are derived from the secret, one for
the role of the sender, one for that of the receiver, so each end knows the other's public key. By
itself a server admits any client that knows the server's key; `transport.session.gatekeeper` sees
to it that this is the sender.
"""

from __future__ import annotations

import hashlib

import zmq
from zmq.utils import z85

SECRET_BYTES = 32
CURVE_PART_BYTES = 33
"""Bytes that encryption adds to each part of a message: command name, nonce, MAC and flags."""
ZAP_DOMAIN = b"vfio-ferry"
"""The name of our sockets in libzmq's question whether a key may connect."""

_PURPOSE = b"vfio-ferry link"
_SENDER = b"sender"
_RECEIVER = b"receiver"


def check_secret(secret: bytes | None) -> None:
    """Raise ValueError unless it is a secret that can be used here, or None."""
    if secret is None:
        return
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes; it has to have {SECRET_BYTES}")
    if not zmq.has("curve"):
        raise ValueError("this libzmq cannot encrypt: install a binary wheel of pyzmq")


def admit_by(secret: bytes, router: zmq.Socket[bytes]) -> None:
    """Let a bound socket admit those alone who hold the secret; there has to be a `Gatekeeper`."""
    router.set(zmq.CURVE_SERVER, 1)
    router.set(zmq.CURVE_SECRETKEY, _secret_key(secret, _RECEIVER))
    router.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)


def prove_by(secret: bytes, dealer: zmq.Socket[bytes]) -> None:
    """Let a socket connect to those alone who hold the secret, and prove to them that we do."""
    own = _secret_key(secret, _SENDER)
    dealer.set(zmq.CURVE_SERVERKEY, zmq.curve_public(_secret_key(secret, _RECEIVER)))
    dealer.set(zmq.CURVE_PUBLICKEY, zmq.curve_public(own))
    dealer.set(zmq.CURVE_SECRETKEY, own)


def sender_public_key(secret: bytes) -> bytes:
    """The public key, 32 bytes, of those who may connect to a receiver."""
    key: bytes = z85.decode(zmq.curve_public(_secret_key(secret, _SENDER)))
    return key


def _secret_key(secret: bytes, role: bytes) -> bytes:
    """The secret key of a role, in Z85."""
    key = hashlib.blake2b(role, key=secret, digest_size=32, person=_PURPOSE).digest()
    encoded: bytes = z85.encode(key)
    return encoded
