"""The verdict on a device that a guest has come to, by what its gateway has seen."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from ferry.migration.device_watch import DeviceState, Verdict, watch_devices
from ferry.migration.receive_options import MAX_WATCH_S, watch_seconds
from sync.gateway.control.info import Activity
from sync.gateway.engine.core import WATCH_S
from sync.gateway.errors import GatewayLost


class Gateway:
    """Tells one status after the other, and the last one for ever."""

    def __init__(self, *told: Activity | None, connected: bool = True) -> None:
        self._told = list(told)
        self._connected = connected

    async def status(self) -> Any:
        activity = self._told.pop(0) if len(self._told) > 1 else self._told[0]
        if activity is None:
            raise GatewayLost("the gateway is gone")
        return SimpleNamespace(activity=activity, device_connected=self._connected)


def _watch(*gateways: Gateway) -> Verdict:
    async def watch(told: Sequence[Any]) -> Verdict:
        return await watch_devices(told, 3)

    clock = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(watch, gateways, clock=clock)


NOTHING, ASKED, WORKS = Activity(), Activity(writes=4, refused=1), Activity(9, 0, 1)
ARMED, POLLED = Activity(writes=4, vectors=2), Activity(writes=4)


@pytest.mark.parametrize(
    ("gateway", "state", "text"),
    [
        (Gateway(NOTHING, ASKED, WORKS), DeviceState.WORKS, ""),
        (Gateway(NOTHING), DeviceState.IDLE, ""),
        (Gateway(*[NOTHING] * 50, ASKED, *[ASKED] * 50, WORKS), DeviceState.WORKS, ""),
        (
            Gateway(NOTHING, ASKED),
            DeviceState.SILENT,
            "device 0 has not interrupted once in 3 s (4 register writes by the guest, "
            "1 accesses refused; a driver that only polls looks the same)",
        ),
        (
            Gateway(NOTHING, ARMED),
            DeviceState.SILENT,
            "device 0 has not interrupted once in 3 s (4 register writes by the guest; a driver "
            "that only polls looks the same)",
        ),
        (
            Gateway(NOTHING, POLLED),
            DeviceState.UNKNOWN,
            "the guest takes no interrupts from device 0, as a driver that polls",
        ),
        (Gateway(NOTHING, connected=False), DeviceState.SILENT, "device 0 is gone"),
        (Gateway(NOTHING, None), DeviceState.SILENT, "device 0: the gateway is gone"),
    ],
)
def test_a_device_is_silent_only_if_it_was_asked(
    gateway: Gateway, state: DeviceState, text: str
) -> None:
    assert _watch(gateway) == Verdict(state, text)


def test_the_gateways_count_for_longer_than_anybody_looks() -> None:
    assert 2 * MAX_WATCH_S < WATCH_S
    assert watch_seconds("0") == 0
    for text in (str(MAX_WATCH_S + 1), "-1", "x"):
        with pytest.raises(ValueError, match="at most 10"):
            watch_seconds(text)


def test_the_worst_of_all_devices_is_told() -> None:
    verdict = _watch(Gateway(WORKS), Gateway(ASKED), Gateway(NOTHING))
    assert verdict.state is DeviceState.SILENT
    assert verdict.text.startswith("device 1 has not")
    assert "BUT A DEVICE DOES NOT WORK there: device 1" in verdict.sentence("there")


def test_a_device_that_cannot_be_judged_is_said_to_be_one() -> None:
    verdict = _watch(Gateway(WORKS), Gateway(POLLED), Gateway(NOTHING))
    assert verdict.state is DeviceState.UNKNOWN
    told = Verdict.told(verdict.state.word, verdict.text).sentence("there")
    assert told.startswith(" Whether all devices work there is not known: the guest takes no")
    assert not Verdict().sentence("there")


def test_what_the_peer_words_otherwise_is_not_known() -> None:
    assert Verdict.told("works", "").state is DeviceState.WORKS
    assert Verdict.told("splendid", "").state is DeviceState.UNKNOWN
    assert not Verdict.told("idle", "x").sentence("there")
