"""What is no data does not wait for lanes that are held up."""

import threading
from typing import Any

import numpy as np
import pytest
import trio

from tests.transport.running import run_trio
from transport.receiving import apply

DEADLINE_S = 20


def test_what_is_no_data_arrives_although_every_lane_is_held_up(
    link_pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_up, go_on = threading.Barrier(3), threading.Event()
    handle = apply.ApplyLane._handle

    def late(*arguments: Any) -> bytes:
        held_up.wait(DEADLINE_S)
        go_on.wait(DEADLINE_S)
        return handle(*arguments)

    async def scenario() -> None:
        async with link_pair(n_pages=1000) as pair:
            monkeypatch.setattr(apply.ApplyLane, "_handle", late)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.sender.send_round, np.arange(1000, dtype=np.uint32), 0)
                await trio.to_thread.run_sync(held_up.wait, DEADLINE_S)
                monkeypatch.setattr(apply.ApplyLane, "_handle", handle)
                await pair.sender.send_record(1, b"heard", flush=True)
                assert (await pair.receiver.receive_record()).payload == b"heard"
                go_on.set()

    run_trio(scenario)
