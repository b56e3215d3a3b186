"""How the threads of a session wait for their sockets, and for how long."""

from __future__ import annotations

import math
import time

import zmq

BLOCKED_S = 0.005
"""Pause before a send is tried again that libzmq's queue had no room for."""


BATCH_MESSAGES = 64
"""Messages received before answers get their turn."""


FAREWELL_MS = 200
"""How long a BYE that says what went wrong may take."""


def wait(poller: zmq.Poller, until: float) -> set[object]:
    """Poll until this monotonic time, at most: what is ready, sockets as such, others by number.

    Each question to a socket that is not ready costs as much as one to a socket that is.
    """
    # Rounded up, so that it is not polled twice.
    timeout_ms = max(0, math.ceil((until - time.monotonic()) * 1000))
    return {which for which, _ in poller.poll(timeout_ms)}
