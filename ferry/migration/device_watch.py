"""Whether the devices work for a guest that has come: what the gateways have seen in a few seconds.

Owns the verdict, which both sides tell. What is counted, and for how long, is the gateways'
(`sync.gateway.control.info.Activity`): the guest's register writes, refused accesses, interrupts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import trio

from sync.gateway.control.client import GatewayClient
from sync.gateway.errors import GatewayError

POLL_S = 0.05
ADVICE = (
    "The guest has moved and stays there; nothing is to be resumed at the source. On the target, "
    "look at the device's process, the gateway's log and `vfio-ferry doctor --gateway ...`: the "
    "guest's requests to this device hang until it works or the guest is started anew."
)


class DeviceState(IntEnum):
    """How a device is for its guest, from the best to the worst."""

    WORKS = 0
    IDLE = 1
    """Nothing was asked of it: a guest need not use its devices."""
    UNKNOWN = 2
    """Nobody looked, the target went away before it could tell, or it was asked and has nothing by
    which it could be seen to answer."""
    SILENT = 3
    """It was asked, and did not interrupt; or it is gone."""

    @property
    def word(self) -> str:
        """As events have it."""
        return self.name.lower()


@dataclass(frozen=True)
class Verdict:
    """What is told of all devices: the worst, and of each that is as bad why."""

    state: DeviceState = DeviceState.UNKNOWN
    text: str = ""

    @classmethod
    def told(cls, word: str, text: str) -> "Verdict":
        """A verdict as the peer words it; `UNKNOWN` for a word that is none."""
        states = {state.word: state for state in DeviceState}
        return cls(states.get(word, DeviceState.UNKNOWN), text)

    def sentence(self, where: str) -> str:
        """What a user has to be told of it; '' where there is nothing."""
        if self.state is DeviceState.UNKNOWN and self.text:
            return f" Whether all devices work {where} is not known: {self.text}."
        if self.state is not DeviceState.SILENT:
            return ""
        return f" BUT A DEVICE DOES NOT WORK {where}: {self.text}. {ADVICE}"


async def watch_devices(gateways: Sequence[GatewayClient], seconds: float) -> Verdict:
    """Looks until each device has interrupted its guest, for `seconds` if nothing is asked of it,
    and so long from what is asked first."""
    verdicts: list[Verdict] = [Verdict()] * len(gateways)

    async def watch(number: int) -> None:
        verdicts[number] = await _watch_device(number, gateways[number], seconds)

    async with trio.open_nursery() as nursery:
        for number in range(len(gateways)):
            nursery.start_soon(watch, number)
    worst = max(each.state for each in verdicts)
    return Verdict(worst, "; ".join(each.text for each in verdicts if each.state is worst))


async def _watch_device(number: int, gateway: GatewayClient, seconds: float) -> Verdict:
    until, asked_before = trio.current_time() + seconds, False
    while True:
        try:
            info = await gateway.status()
        except GatewayError as error:
            return Verdict(DeviceState.SILENT, f"device {number}: {error}")
        did = info.activity
        if did.interrupts:
            return Verdict(DeviceState.WORKS)
        if not info.device_connected:
            return Verdict(DeviceState.SILENT, f"device {number} is gone")
        asked = bool(did.writes or did.refused)
        if asked and not asked_before:
            until, asked_before = trio.current_time() + seconds, True
        if trio.current_time() >= until:
            if not asked:
                return Verdict(DeviceState.IDLE)
            if not did.vectors and not did.refused:
                return Verdict(
                    DeviceState.UNKNOWN,
                    f"the guest takes no interrupts from device {number}, as a driver that polls",
                )
            refused = f", {did.refused} accesses refused" if did.refused else ""
            return Verdict(
                DeviceState.SILENT,
                f"device {number} has not interrupted once in {seconds:g} s ({did.writes} register "
                f"writes by the guest{refused}; a driver that only polls looks the same)",
            )
        await trio.sleep(POLL_S)
