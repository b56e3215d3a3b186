"""What the target's VMM is told of its devices comes after every page that it may look at."""

from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from ferry.migration.downtime import Downtime
from ferry.migration.source import Source


def test_i6_the_tail_is_passed_on_when_all_pages_are_there() -> None:
    log: list[str] = []
    tail, loaded = trio.Event(), trio.Event()

    def noted(what: str, then: trio.Event | None = None) -> Any:
        async def step(*_: object) -> None:
            # Whoever does not wait for this one is ahead of it.
            await trio.testing.wait_all_tasks_blocked()
            log.append(what)
            if then is not None:
                then.set()

        return step

    def release_tail() -> None:
        log.append("tail released")
        loaded.set()

    stream = SimpleNamespace(
        is_open=True, tail_began=tail, hurry=lambda: None, release_tail=release_tail
    )
    precopy = SimpleNamespace(
        collect_devices=noted("devices' pages collected"), finish=noted("pages finished")
    )
    vmm = SimpleNamespace(
        continue_switchover=noted("VMM goes on", tail), wait_completed=noted("VMM is done")
    )
    link = SimpleNamespace(send=noted("asked whether it is loaded"), loaded=loaded)
    source: Any = SimpleNamespace(_stop_pacing=noted("pacing stopped"))
    prepared: Any = SimpleNamespace(vmm=vmm, link=link, devices=())
    mediated: Any = SimpleNamespace(stream=stream, precopy=precopy)

    async def final() -> None:
        with trio.fail_after(10):
            await Source._send_final(source, prepared, mediated, Downtime(0.0, 0.0))

    trio.run(final)
    assert log.index("devices' pages collected") < log.index("VMM goes on")
    assert log.index("VMM goes on") < log.index("pages finished") < log.index("tail released")
