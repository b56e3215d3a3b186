"""One line of progress on a terminal, redrawn in place; whatever else is printed goes above it.

Owns how the line is made to fit. The drawing is tqdm's, which is imported where
there is a terminal and nowhere else.
"""

import os
import threading
from typing import TextIO


def fitted(parts: list[str], columns: int) -> str:
    """As many of `parts`, from the first, as a line of `columns` has room for."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > columns:
            break
        line = longer
    return line or parts[0][:columns]


class ProgressLine:
    """The line at the end of what `stream`, a terminal, shows."""

    def __init__(self, stream: TextIO) -> None:
        from tqdm import tqdm

        # Neither a thread that watches nor a lock among processes is needed for one line.
        tqdm.monitor_interval = 0
        tqdm.set_lock(threading.RLock())
        self._stream = stream
        self._bar = tqdm(file=stream, bar_format="{desc}", leave=False, dynamic_ncols=True)
        self._parts: list[str] = []

    def show(self, parts: list[str]) -> None:
        """Draws the line anew, of a width that the terminal has now."""
        self._parts = parts
        columns = os.get_terminal_size(self._stream.fileno()).columns
        self._bar.set_description_str(fitted(parts, (columns or 80) - 1))

    def print_above(self, text: str) -> None:
        """Writes lines of their own, and the line again below them."""
        self._bar.clear()
        self._stream.write(f"{text}\n")
        if self._parts:
            self.show(self._parts)
        self._stream.flush()

    def clear(self) -> None:
        """Takes the line away, until `show` is called again."""
        self._parts = []
        self._bar.set_description_str("", refresh=False)
        self._bar.clear()
