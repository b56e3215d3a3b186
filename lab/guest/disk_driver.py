"""What every driver of a disk has in common: the requests in flight, each in a numbered slot.

Owns the slots and what the CPU asks of a driver. How a request gets to the device and back is the
business of `virtio_blk` and `nvme`. As strict as a real driver: it looks at a ring when an
interrupt tells it to and never otherwise, so that a lost interrupt is a lost request.
"""

import time
from abc import ABC, abstractmethod
from typing import Any

from lab.guest.errors import GuestPanic, StreamError
from lab.guest.fields import Fields
from lab.guest.layout import Layout
from lab.guest.options import GuestOptions
from lab.guest.requests import Kind, Request
from lab.guest.workload import Workload


class DiskDriver(ABC):
    """Drives one disk for one workload. `DeviceLost` may come out of every method."""

    def __init__(self, layout: Layout, options: GuestOptions, workload: Workload) -> None:
        self._layout = layout
        self._options = options
        self._workload = workload
        self._slots: list[Request | None] = [None] * options.queue_depth
        self._free = list(range(options.queue_depth))
        self.started = False

    @abstractmethod
    def start(self) -> None:
        """Initialises the device; what was in flight is submitted anew."""

    @abstractmethod
    def interrupt(self, vectors: set[int]) -> None:
        """Handles interrupts. Raises `GuestPanic` if the device breaks its own rules."""

    @abstractmethod
    def recover(self) -> None:
        """Goes on with a device whose connection was lost and is there again."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """VM state that is not in RAM, with the slots as `_slots_state` tells them."""

    @abstractmethod
    def load_state(self, fields: Fields) -> None:
        """Takes over from the driver of another guest. Raises `StreamError`."""

    @abstractmethod
    def _add(self, slot: int, request: Request) -> None:
        """Writes a request to where the device looks for it."""

    @abstractmethod
    def _publish(self) -> None:
        """Tells the device of all that was added."""

    @property
    def slots_free(self) -> bool:
        return bool(self._free)

    def oldest_outstanding_s(self, now: float) -> float:
        """How long the oldest request has been in flight; 0 if there is none."""
        since = [slot.submitted_at for slot in list(self._slots) if slot is not None]
        return max(0.0, now - min(since)) if since else 0.0

    def outstanding(self) -> int:
        """How many requests are in flight."""
        return len(self._slots) - len(self._free)

    def fill(self) -> None:
        """Submits requests until the queue depth is reached or the workload has no more."""
        now = time.time()
        requests: list[Request] = []
        while len(requests) < len(self._free):
            request = self._workload.next_request(now)
            if request is None:
                break
            if request.kind is Kind.FLUSH and not self._can_flush():
                continue
            requests.append(request)
        self._submit(requests)

    def _can_flush(self) -> bool:
        return True

    def _submit(self, requests: list[Request]) -> None:
        if not requests:
            return
        now = time.time()
        for request in requests:
            request.submitted_at = now
            slot = self._free.pop()
            self._slots[slot] = request
            self._add(slot, request)
        self._publish()

    def _submit_again(self) -> None:
        for slot, request in enumerate(self._slots):
            if request is not None:
                self._add(slot, request)
        self._publish()

    def _finish(self, slot: int, status: int) -> None:
        """The device has finished a request. Raises `GuestPanic` if it was not in flight."""
        request = self._in_flight(slot)
        self._slots[slot] = None
        self._free.append(slot)
        self._workload.complete(request, status, time.time())

    def _in_flight(self, slot: int) -> Request:
        request = self._slots[slot] if slot < len(self._slots) else None
        if request is None:
            raise GuestPanic(f"the device finished request {slot}, which is not in flight")
        return request

    def _slots_state(self) -> list[dict[str, Any] | None]:
        return [None if slot is None else slot.to_json() for slot in self._slots]

    def _load_slots(self, fields: Fields) -> None:
        slots = fields.items("slots", len(self._slots))
        if len(slots) != len(self._slots):
            raise StreamError("another queue depth")
        n_buffers = {
            Kind.READ: self._layout.n_read_buffers,
            Kind.GET_ID: self._layout.n_read_buffers,
            Kind.WRITE: self._layout.n_write_buffers,
            Kind.FLUSH: 1,
        }
        for slot, request in enumerate(slots):
            if request is None:
                continue
            loaded = Request.from_json(
                Fields(request, f"slot {slot}"),
                n_blocks=self._layout.n_blocks,
                n_buffers=n_buffers,
            )
            self._slots[slot] = loaded
            self._workload.hold(loaded)
        self._free = [slot for slot, request in enumerate(self._slots) if request is None]
