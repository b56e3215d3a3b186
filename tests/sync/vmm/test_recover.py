"""Bringing a source back: the rule, and the blocking shell that the gateway uses."""

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import trio

from sync.vmm.client import QmpClient
from sync.vmm.errors import QmpProtocolError, VmmGone, VmmNotReady
from sync.vmm.recover import recover_source
from sync.vmm.states import ResumeStep, resume_step

RUN_STATES = [
    "running",
    "suspended",
    "paused",
    "prelaunch",
    "finish-migrate",
    "postmigrate",
    "inmigrate",
    "shutdown",
    "internal-error",
    "guest-panicked",
]
STATUSES = [
    "none",
    "setup",
    "active",
    "pre-switchover",
    "device",
    "cancelling",
    "cancelled",
    "failed",
    "completed",
]


def simulate(step: ResumeStep, run_state: str, status: str) -> tuple[str, str]:
    """What QEMU makes of a step, in the worst case: everything takes a turn of its own."""
    if step is ResumeStep.CANCEL:
        return run_state, "cancelling"
    if step is ResumeStep.CONTINUE:
        return "running", status
    if status == "cancelling":
        return run_state, "cancelled"
    return ("running" if run_state == "finish-migrate" else run_state), status


@pytest.mark.parametrize("run_state", RUN_STATES)
@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("ran", [True, False])
def test_i8_i12_the_rule_leads_back_from_every_state_or_leaves_the_guest_as_it_is(
    run_state: str, status: str, ran: bool
) -> None:
    for _ in range(6):
        try:
            step = resume_step(run_state, status, ran=ran)
        except VmmNotReady:
            assert run_state == "inmigrate"
            return
        if step is ResumeStep.CONTINUE:
            assert ran
            assert run_state == "postmigrate"
        if step is ResumeStep.NOTHING:
            assert run_state not in ("finish-migrate", "save-vm")
            assert run_state != "postmigrate" or not ran
            assert status not in ("setup", "active", "pre-switchover", "device", "cancelling")
            return
        run_state, status = simulate(step, run_state, status)
    raise AssertionError(f"it goes round in circles: {run_state} {status}")


def recovered(qemu: Any, deadline_s: float = 5.0) -> Any:
    return trio.to_thread.run_sync(recover_source, qemu.path, deadline_s)


def test_it_says_what_it_did(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "finish-migrate"
        qemu.migration = {"status": "pre-switchover"}

        def cancel() -> None:
            qemu.becomes("cancelled")
            qemu.run_state = "postmigrate"

        qemu.on["migrate_cancel"] = cancel
        qemu.on["cont"] = lambda: setattr(qemu, "run_state", "running")
        assert await recovered(qemu) == "migrate_cancel from pre-switchover, cont from postmigrate"
        assert await recovered(qemu) == "the guest was running"

    with_qemu(body)


def test_it_connects_again_when_the_connection_breaks(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "postmigrate"
        asked = 0
        breaking = trio.Event()

        def breaks() -> None:
            nonlocal asked
            asked += 1
            breaking.set()
            if asked == 1:
                raise trio.BrokenResourceError

        def cont() -> None:
            qemu.run_state = "running"

        qemu.on["query-migrate"] = breaks
        qemu.on["cont"] = cont
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def hang_up() -> None:
                await breaking.wait()
                await qemu.hang_up()

            assert await recovered(qemu) == "cont from postmigrate"
        assert asked > 1

    with_qemu(body)


def test_a_guest_that_does_not_come_back_is_told_of(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "finish-migrate"
        with pytest.raises(VmmNotReady, match="finish-migrate"):
            await recovered(qemu, 1.0)
        qemu.run_state = "postmigrate"
        qemu.errors["cont"] = "no"
        with pytest.raises(VmmNotReady, match="postmigrate"):
            await recovered(qemu, 1.0)
        qemu.silent.add("cont")
        with pytest.raises(VmmNotReady, match="postmigrate"):
            await recovered(qemu, 1.0)

    with_qemu(body)


def test_a_vmm_that_is_not_there_or_is_silent_is_told_of(
    with_qemu: Any, socket_folder: Any
) -> None:
    with pytest.raises(VmmGone):
        recover_source(str(socket_folder / "nobody"), 0.05)

    async def body(qemu: Any) -> None:
        qemu.silent.add("query-migrate")
        with pytest.raises(VmmGone):
            await recovered(qemu, 0.1)

    with_qemu(body)


def test_i9_nonsense_is_told_of(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.migration = {"status": 7}
        with pytest.raises(QmpProtocolError):
            await recovered(qemu)

    with_qemu(body)


def test_it_needs_no_trio() -> None:
    code = "import sys, sync.vmm.recover; sys.exit('trio' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_i12_what_others_have_stopped_is_left_and_told(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "io-error"
        assert await recovered(qemu) == "the guest is stopped by an I/O error and is left so"
        assert "cont" not in qemu.commands

    with_qemu(body)


def test_i8_a_holder_that_hangs_is_ended_and_the_guest_brought_back(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "postmigrate"
        qemu.on["cont"] = lambda: setattr(qemu, "run_state", "running")
        holder = await QmpClient.connect(qemu.path)
        ended: list[str] = []

        def end_holder() -> None:
            ended.append("once")
            trio.from_thread.run(holder.aclose)

        done = await trio.to_thread.run_sync(
            partial(recover_source, qemu.path, 10.0, end_holder=end_holder)
        )
        assert done == ("the process that held QMP and hung was ended, cont from postmigrate")
        assert ended == ["once"]

    with_qemu(body)


def test_i7_a_vmm_that_others_have_taken_over_is_left_alone(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "postmigrate"
        with pytest.raises(VmmNotReady, match="another one"):
            await trio.to_thread.run_sync(
                partial(recover_source, qemu.path, 5.0, "{}", wanted=lambda: False)
            )
        assert {"cont", "migrate_cancel", "migrate-set-parameters"}.isdisjoint(qemu.commands)

    with_qemu(body)
