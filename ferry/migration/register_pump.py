"""The devices' registers on their way across while the guest runs: captured operations and state.

Owns the task that fetches them from the gateways and sends them, and its two ends: between two
turns, so that nothing is lost, or at once, when nothing matters any more.
"""

import trio

from ferry.migration.handover_runner import HandoverRunner
from ferry.migration.source_devices import SourceDevice
from ferry.migration.source_link import SourceLink
from sync.handover.machine import Event
from transport.wire.errors import TransportError

INTERVAL_S = 0.02
"""How often captured register operations are fetched. The journal holds a second of the densest
access pattern a VMM can make, so this only sets how fresh the target's registers are."""


class RegisterPump:
    """Fetches and sends the registers of the devices that were added, while `run` runs."""

    def __init__(self, link: SourceLink, runner: HandoverRunner) -> None:
        self._link = link
        self._runner = runner
        self._devices: list[SourceDevice] = []
        self._scope = trio.CancelScope()
        self._stop = trio.Event()
        self._ended = trio.Event()

    def add(self, device: SourceDevice) -> None:
        """Has this device's registers fetched, too, from the next turn on."""
        self._devices.append(device)

    async def run(self) -> None:
        """Fetches and sends, turn after turn, until `finish` or `give_up`. The handover hears of
        what goes wrong."""
        try:
            with self._scope:
                # Ends between two turns: what was taken from a gateway has to be sent.
                while not self._stop.is_set():
                    for device in self._devices:
                        async for payload in device.registers.precopy():
                            await self._link.send_state(device.number, payload)
                    with trio.move_on_after(INTERVAL_S):
                        await self._stop.wait()
        except TransportError as error:
            self._runner.post(Event.PEER_LOST, error)
        except Exception as error:
            self._runner.post(Event.FAILED, error)
        finally:
            self._ended.set()

    async def finish(self) -> None:
        """Lets the turn that is going on be the last, and waits for its end."""
        self._stop.set()
        await self._ended.wait()

    async def give_up(self) -> None:
        """Ends the turn that is going on, wherever it is, and waits for that."""
        self._scope.cancel()
        await self._ended.wait()
