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
            line = " ".join([f"gateway: {event}", *told])
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
