"""The driver against a scripted QEMU: the sequence, and each way in which it can go wrong."""

import math
from typing import Any

import pytest
import trio
import trio.testing

from sync.vmm.driver import Vmm, parse_progress
from sync.vmm.errors import MigrationFailed, QmpProtocolError, VmmGone, VmmNotReady


def test_the_source_sequence(with_qemu: Any, active_migration: Any) -> None:
    async def body(qemu: Any) -> None:
        def start() -> None:
            qemu.migration = dict(active_migration)
            qemu.becomes("active")

        def proceed() -> None:
            qemu.becomes("device")
            qemu.becomes("completed", "postmigrate", downtime=31)

        qemu.on["migrate"] = start
        qemu.on["migrate-continue"] = proceed
        async with await Vmm.connect(qemu.path) as vmm:
            await vmm.check_source()
            qemu.commands.clear()
            await vmm.start_outgoing("unix:/run/stream")
            assert qemu.commands == [
                "migrate-set-capabilities",
                "migrate-set-parameters",
                "migrate",
            ]
            assert qemu.arguments["migrate"] == {"uri": "unix:/run/stream"}
            assert qemu.arguments["migrate-set-parameters"] == {"downtime-limit": 0}
            assert qemu.arguments["migrate-set-capabilities"] == {
                "capabilities": [
                    {"capability": "events", "state": True},
                    {"capability": "pause-before-switchover", "state": True},
                ]
            }
            progress = await vmm.progress()
            assert progress.transferred_bytes == 98203465
            assert progress.remaining_bytes == 1069056
            assert progress.dirty_pages_per_s == 812
            assert progress.rounds == 3
            await vmm.allow_switchover(250)
            assert qemu.arguments["migrate-set-parameters"] == {"downtime-limit": 250}
            with trio.move_on_after(0.02) as early:
                await vmm.wait_pre_switchover()
            assert early.cancelled_caught
            qemu.becomes("pre-switchover", "finish-migrate")
            await qemu.send_events()
            paused = await vmm.wait_pre_switchover()
            assert paused.guest_paused_at == 1700000042.25
            await vmm.continue_switchover()
            assert qemu.arguments["migrate-continue"] == {"state": "pre-switchover"}
            await vmm.wait_completed()
            assert (await vmm.progress()).downtime_ms == 31

    with_qemu(body)


def test_a_vmm_that_pauses_its_guest_by_itself_is_noticed_at_once(
    with_qemu: Any, active_migration: Any
) -> None:
    async def body(qemu: Any) -> None:
        def start() -> None:
            qemu.migration = dict(active_migration)
            qemu.becomes("active")

        qemu.on["migrate"] = start
        async with await Vmm.connect(qemu.path) as vmm:
            # What an earlier migration came to does not count.
            qemu.becomes("pre-switchover")
            await qemu.send_events()
            await vmm.progress()
            await vmm.start_outgoing("unix:/run/stream")
            assert not await vmm.paused_within(0.02)
            qemu.commands.clear()
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    assert await vmm.paused_within(math.inf)

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                qemu.becomes("pre-switchover", "finish-migrate")
                await qemu.send_events()
            assert await vmm.paused_within(0.0)
            assert not qemu.commands
            qemu.becomes("active")
            await qemu.send_events()
            await vmm.progress()
            assert not await vmm.paused_within(0.0)

    with_qemu(body)


def test_the_target_sequence(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "inmigrate"
        qemu.on["migrate-incoming"] = lambda: qemu.becomes("setup")
        qemu.on["cont"] = lambda: setattr(qemu, "run_state", "running")
        async with await Vmm.connect(qemu.path) as vmm:
            await vmm.check_target()
            await vmm.start_incoming("unix:/run/stream")
            assert qemu.arguments["migrate-incoming"] == {"uri": "unix:/run/stream"}
            assert not [name for name in qemu.commands if name.startswith("migrate-set")]
            loaded = trio.Event()
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def wait() -> None:
                    await vmm.wait_loaded()
                    loaded.set()

                qemu.becomes("active")
                await qemu.send_events()
                qemu.becomes("completed")
                await qemu.send_events()
                await trio.sleep(0.02)
                assert not loaded.is_set()
                # QEMU does not tell this one.
                qemu.run_state = "paused"
            await vmm.resume()
            assert await vmm.run_state() == "running"

    with_qemu(body)


@pytest.mark.parametrize("state", ["paused", "inmigrate", "postmigrate", "internal-error"])
def test_a_source_that_does_not_run_is_refused(with_qemu: Any, state: str) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = state
        async with await Vmm.connect(qemu.path) as vmm:
            with pytest.raises(VmmNotReady, match=state):
                await vmm.check_source()

    with_qemu(body)


def test_a_vmm_that_names_what_blocks_it_is_refused(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.migration = {"blocked-reasons": ["a device cannot be migrated", "nor another"]}
        async with await Vmm.connect(qemu.path) as vmm:
            with pytest.raises(VmmNotReady, match="a device cannot be migrated; nor another"):
                await vmm.check_source()

    with_qemu(body)


def test_a_vmm_that_cannot_pause_or_is_migrating_is_refused(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            qemu.migration = {"status": "active"}
            with pytest.raises(VmmNotReady, match="already"):
                await vmm.check_source()
            qemu.migration = {"status": "cancelled"}
            await vmm.check_source()
            qemu.capabilities.remove("pause-before-switchover")
            with pytest.raises(VmmNotReady, match="pause-before-switchover"):
                await vmm.check_source()
            qemu.run_state = "inmigrate"
            with pytest.raises(VmmNotReady, match="pause-before-switchover"):
                await vmm.check_target()

    with_qemu(body)


def test_a_target_that_is_not_waiting_is_refused(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            with pytest.raises(VmmNotReady, match="-incoming defer"):
                await vmm.check_target()

    with_qemu(body)


@pytest.mark.parametrize("status", ["failed", "cancelled"])
@pytest.mark.parametrize("wait", ["wait_pre_switchover", "wait_completed", "wait_loaded"])
def test_a_migration_that_fails_ends_every_wait(with_qemu: Any, status: str, wait: str) -> None:
    async def body(qemu: Any) -> None:
        qemu.migration = {"status": "active"}
        async with await Vmm.connect(qemu.path) as vmm, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def fails() -> None:
                with pytest.raises(MigrationFailed) as failure:
                    await getattr(vmm, wait)()
                assert failure.value.status == status
                assert failure.value.description == "Unable to write to socket: Broken pipe"

            await trio.testing.wait_all_tasks_blocked()
            reason = {"error-desc": "Unable to write to socket: Broken pipe"}
            qemu.becomes(status, **reason)
            await qemu.send_events()

    with_qemu(body)


def test_a_vmm_that_does_not_wait_in_pre_switchover_is_told_of(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.migration = {"status": "completed"}
        async with await Vmm.connect(qemu.path) as vmm:
            with pytest.raises(MigrationFailed, match="did not wait"):
                await vmm.wait_pre_switchover()

    with_qemu(body)


def test_a_target_that_dies_ends_the_wait(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.migration = {"status": "active"}
        async with await Vmm.connect(qemu.path) as vmm, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def fails() -> None:
                with pytest.raises(VmmGone):
                    await vmm.wait_loaded()

            await trio.testing.wait_all_tasks_blocked()
            await qemu.hang_up()

    with_qemu(body)


def test_cancelling_follows_the_vmm_through_its_states(with_qemu: Any) -> None:
    """Pre-switchover, cancelled while the guest is still not running, then running by itself."""

    async def body(qemu: Any) -> None:
        qemu.migration = {"status": "pre-switchover"}
        qemu.run_state = "finish-migrate"
        seen = 0

        def cancel() -> None:
            qemu.becomes("cancelling")

        def look() -> None:
            nonlocal seen
            if qemu.migration["status"] != "pre-switchover":
                seen += 1
            if seen == 3:
                qemu.becomes("cancelled")
            if seen == 5:
                qemu.run_state = "running"

        qemu.on["migrate_cancel"] = cancel
        qemu.on["query-migrate"] = look
        async with await Vmm.connect(qemu.path) as vmm:
            await vmm.cancel_and_resume(10.0)
            assert qemu.commands.count("migrate_cancel") == 1
            assert "cont" not in qemu.commands
            assert qemu.run_state == "running"

    with_qemu(body)


def test_a_source_that_its_migration_has_stopped_is_continued(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.migration = {"status": "completed"}
        qemu.run_state = "postmigrate"
        qemu.on["cont"] = lambda: setattr(qemu, "run_state", "running")
        async with await Vmm.connect(qemu.path) as vmm:
            assert await vmm.cancel_and_resume(5.0) == "running"
            assert "migrate_cancel" not in qemu.commands

    with_qemu(body)


STOPPED_BY_OTHERS = ["paused", "io-error", "shutdown", "guest-panicked", "watchdog", "suspended"]


@pytest.mark.parametrize("state", STOPPED_BY_OTHERS)
def test_i12_a_guest_that_something_else_has_stopped_is_left_as_it_is(
    with_qemu: Any, state: str
) -> None:
    """While pages are sent. The migration ends with QEMU giving back what it found."""

    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            await vmm.check_source()
            qemu.migration = {"status": "active"}
            qemu.run_state = state
            await vmm.check_migration()
            qemu.becomes("pre-switchover", "finish-migrate")
            await vmm.wait_pre_switchover()
            assert vmm.guest_was == state

            def cancel() -> None:
                qemu.becomes("cancelled")
                qemu.run_state = state

            qemu.on["migrate_cancel"] = cancel
            assert await vmm.cancel_and_resume(5.0) == state
            assert "cont" not in qemu.commands

    with_qemu(body)


def test_i12_a_guest_that_was_paused_stays_so_once_its_vmm_has_sent_everything(
    with_qemu: Any,
) -> None:
    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            qemu.run_state = "paused"
            await vmm.note_guest()
            qemu.becomes("completed", "postmigrate")
            await vmm.note_guest()
            assert await vmm.cancel_and_resume(5.0) == "postmigrate"
            assert "cont" not in qemu.commands

    with_qemu(body)


def test_i12_a_guest_that_went_on_again_is_one_that_ran(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            for state in ("paused", "running", "finish-migrate"):
                qemu.run_state = state
                await vmm.note_guest()
            assert vmm.guest_ran

    with_qemu(body)


@pytest.mark.parametrize("state", ["paused", "io-error", "shutdown", "guest-panicked", "prelaunch"])
def test_a_guest_that_does_not_run_is_refused_by_name(with_qemu: Any, state: str) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = state
        async with await Vmm.connect(qemu.path) as vmm:
            with pytest.raises(VmmNotReady, match=r"is .* by|powered off|not started"):
                await vmm.check_source()

    with_qemu(body)


@pytest.mark.parametrize("state", ["paused", "suspended", "io-error", "shutdown"])
def test_a_loaded_guest_is_what_the_source_said_it_was(with_qemu: Any, state: str) -> None:
    async def body(qemu: Any) -> None:
        qemu.migration = {"status": "completed"}
        qemu.run_state = "paused" if state == "suspended" else state
        qemu.on["cont"] = lambda: setattr(qemu, "run_state", state)
        async with await Vmm.connect(qemu.path) as vmm:
            await vmm.wait_loaded()
            if state == "suspended":
                await vmm.resume()

    with_qemu(body)


def test_a_step_that_came_too_late_is_not_the_end(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "postmigrate"
        qemu.errors["cont"] = "Resetting the Virtual Machine is required"
        async with await Vmm.connect(qemu.path) as vmm:
            with pytest.raises(VmmNotReady, match="by hand"):
                await vmm.cancel_and_resume(0.1)
            assert qemu.commands.count("cont") > 1

    with_qemu(body)


def test_a_guest_that_cannot_run_is_told_of_at_once(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "internal-error"
        async with await Vmm.connect(qemu.path) as vmm:
            with pytest.raises(VmmNotReady, match="internal-error"):
                await vmm.resume()

    with_qemu(body)


def test_a_guest_that_runs_during_its_switchover_is_told_of(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.run_state = "finish-migrate"
        async with await Vmm.connect(qemu.path) as vmm:
            await vmm.settle()
            qemu.run_state = "running"
            with pytest.raises(VmmNotReady, match="from outside"):
                await vmm.settle()

    with_qemu(body)


def test_a_vmm_that_goes_while_nobody_talks_to_it_is_noticed(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm, trio.open_nursery() as nursery:

            async def notice() -> None:
                with pytest.raises(VmmGone):
                    await vmm.wait_gone()

            nursery.start_soon(notice)
            await trio.testing.wait_all_tasks_blocked()
            await qemu.hang_up()

    with_qemu(body)


def test_quitting_a_vmm_that_just_goes_is_no_error(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            qemu.silent.add("quit")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vmm.quit)
                await trio.testing.wait_all_tasks_blocked()
                await qemu.hang_up()

    with_qemu(body)


def test_progress_before_any_migration() -> None:
    progress = parse_progress({})
    assert progress.status == "none"
    assert progress.transferred_bytes == progress.remaining_bytes == 0


@pytest.mark.parametrize(
    "answer",
    [
        [],
        None,
        {"status": 1},
        {"status": "active", "ram": 5},
        {"status": "active", "ram": {"transferred": "much"}},
        {"status": "active", "ram": {"transferred": -1}},
        {"status": "active", "ram": {"remaining": True}},
        {"status": "active", "ram": {"total": math.nan}},
        {"status": "active", "downtime": math.inf},
    ],
)
def test_i9_malformed_progress_is_refused(answer: Any) -> None:
    with pytest.raises(QmpProtocolError):
        parse_progress(answer)
