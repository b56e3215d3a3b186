"""The gateway's events, as lines of text or JSON, without ever waiting for who reads them."""

import json
import os
import select
import time

SCHEMA = 1
"""Of the JSON lines of every command. Raised when a key goes or means something else, not when one
is added."""
MAX_LINE_BYTES = 4096
"""A pipe that is writable at all takes this much at once (PIPE_BUF)."""


MEANING = {
    "device-lost": "the device is gone, and with it the guest's",
    "vmm-lost": "the VMM is gone",
    "lease-taken": "a send or receive gives orders from here on",
    "lease-lost": "the send or receive that gave orders is gone",
    "client-gone": "a control connection has ended",
    "mediated": "registers and writes are followed: a migration has begun",
    "stopped": "the device is at rest, the guest stands still",
    "released": "this host has let go of the guest",
    "reclaimed": "this host has taken its guest back",
    "restored": "the device is in passthrough again",
    "standby": "the device waits for a guest",
    "owned": "the commit has come: the guest is this host's",
    "started": "the device works for the guest",
    "fenced": "the guest will never start here from this session",
    "abandoned": "the device no longer waits for a guest",
    "recovering": "the VMM is being resumed, for nobody else is left to do it",
    "recovered": "whether its guest goes on is told by `ok`",
}
"""What an event means, for people."""


class Log:
    """Writes to `descriptor`; a line that nobody takes is dropped and counted (I10)."""

    def __init__(self, descriptor: int, *, as_json: bool) -> None:
        self._descriptor = descriptor
        self._as_json = as_json
        self.dropped = 0

    def __call__(self, event: str, **fields: object) -> None:
        """One line: `event` and its fields."""
        if self._as_json:
            head = {"time": round(time.time(), 6), "event": event, "schema": SCHEMA}
            line = json.dumps(head | fields)
        else:
            told = (f"{name}={json.dumps(value)}" for name, value in fields.items() if value != "")
            meaning = f" ({MEANING[event]})" if event in MEANING else ""
            line = " ".join([f"gateway: {event}{meaning}", *told])
        data = line.encode(errors="replace")[: MAX_LINE_BYTES - 1] + b"\n"
        try:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLOUT)
            if not any(events & select.POLLOUT for _, events in poll.poll(0)):
                self.dropped += 1
                return
            os.write(self._descriptor, data)
        except OSError:
            self.dropped += 1
