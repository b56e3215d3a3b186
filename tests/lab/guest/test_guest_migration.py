"""Two guest processes and a migration between them; the test stands in for the product."""

import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from lab.guest.control import guest_report, verify_guest
from lab.guest.stream import StreamWriter
from sync.vmm.driver import Vmm
from sync.vmm.errors import MigrationFailed, VmmGone, VmmNotReady, VmmRefused
from sync.vmm.recover import recover_source

DEADLINE_S = 20.0
HIGH = 4 << 30


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            await body()

    trio.run(main)


async def connect(bench: Any, name: str) -> Vmm:
    return await Vmm.connect(bench.path(name), deadline_s=DEADLINE_S)


async def reads(vmm: Vmm, more: int) -> dict[str, Any]:
    """Waits for `more` reads; the report then."""
    start = (await guest_report(vmm))["reads"]
    while True:
        report = await guest_report(vmm)
        if report["reads"] >= start + more or report["failure"]:
            return report
        await trio.sleep(0.01)


async def copied(vmm: Vmm) -> None:
    """Waits until the source has copied everything once and goes on with rounds."""
    while True:
        if (await vmm.progress()).rounds >= 2:
            return
        await trio.sleep(0.005)


async def switch(source: Vmm, target: Vmm, old: Any, new: Any, pages: Any = True) -> None:
    """What the product does from convergence to the running target."""
    await source.allow_switchover(300)
    paused = await source.wait_pre_switchover()
    assert paused.guest_paused_at > 0
    assert await source.run_state() == "finish-migrate"
    old.hold()
    await source.continue_switchover()
    await source.wait_completed()
    await target.wait_loaded()
    assert await target.run_state() == "paused"
    new.take_over(old, pages=pages)
    # A notification that was still on its way when the old device was held served nothing.
    new.kick()
    new.fire()
    await target.resume()


@pytest.mark.parametrize("irq", ["msix", "intx"])
def test_a_guest_moves_under_load_there_and_back(bench: Any, new_disk: Any, irq: str) -> None:
    disks = [new_disk()]
    bench.serve(disks[0], "g0-dev")
    bench.start("g0", irq=irq)
    for number in (1, 2):
        disks.append(new_disk(disks[0].content))
        bench.serve(disks[number], f"g{number}-dev")
        bench.start(f"g{number}", incoming=True, irq=irq)

    async def body() -> None:
        async with (
            await connect(bench, "g0") as first,
            await connect(bench, "g1") as second,
            await connect(bench, "g2") as third,
        ):
            vmms = [first, second, third]
            await reads(first, 50)
            for number in (0, 1):
                source, target = vmms[number], vmms[number + 1]
                uri = f"unix:{bench.path(f'stream{number}')}"
                await source.check_source()
                await target.check_target()
                await target.start_incoming(uri)
                await source.start_outgoing(uri)
                await copied(source)
                await reads(source, 50)
                progress = await source.progress()
                assert progress.status == "active"
                assert progress.total_bytes == 8 << 20
                assert progress.transferred_bytes > 0
                await switch(source, target, disks[number], disks[number + 1])
                assert await source.run_state() == "postmigrate"
                report = await reads(target, 50)
                assert report["migrations"] == number + 1
            verified = await verify_guest(third)
            assert verified["verification"]["state"] == "passed", verified
            assert verified["verification"]["buffers"] > 100
            for name in ("checksum_errors", "buffer_errors", "io_errors", "device_resets"):
                assert verified[name] == 0, verified
            assert verified["device_id"] == "fake-disk"

    run(body)


def test_the_target_does_not_touch_what_the_device_is(bench: Any, new_disk: Any) -> None:
    """After loading, the VMM sets its interrupts and maps its low RAM anew, and no more."""
    old = new_disk()
    bench.serve(old, "a-dev")
    bench.start("a")
    new = new_disk(old.content)
    bench.serve(new, "b-dev")
    bench.start("b", incoming=True)

    async def body() -> None:
        async with await connect(bench, "a") as source, await connect(bench, "b") as target:
            await reads(source, 20)
            assert new.resets == 1
            assert new.config[0x10:0x14] == bytes(4)
            seen = len(new.seen)
            uri = f"unix:{bench.path('stream')}"
            await target.start_incoming(uri)
            await source.start_outgoing(uri)
            await source.allow_switchover(300)
            await source.wait_pre_switchover()
            await source.continue_switchover()
            await target.wait_loaded()
            assert new.seen[seen:] == ["unmap 0x0", "map 0x0", "irqs 0x24 2 2"]
            assert new.resets == 1
            assert bytes(new.common) == bytes(new_disk().common)

    run(body)


def test_what_the_device_wrote_is_stale_without_the_product(bench: Any, new_disk: Any) -> None:
    """The VMM is as blind as QEMU: pages that the device wrote after the bulk pass stay behind."""
    old = new_disk()
    bench.serve(old, "a-dev")
    bench.start("a")
    new = new_disk(old.content)
    bench.serve(new, "b-dev")
    bench.start("b", incoming=True)

    async def body() -> None:
        async with await connect(bench, "a") as source, await connect(bench, "b") as target:
            await reads(source, 50)
            uri = f"unix:{bench.path('stream')}"
            await target.start_incoming(uri)
            await source.start_outgoing(uri)
            await copied(source)
            await reads(source, 100)
            # The rings are carried, or the guest would not even get as far as to notice.
            await switch(source, target, old, new, pages=lambda address: address < HIGH)
            verified = await verify_guest(target)
            assert verified["verification"]["state"] == "failed"
            assert verified["buffer_errors"] > 50

    run(body)


@pytest.mark.parametrize("irq", ["msix", "intx"])
def test_an_interrupt_that_came_after_the_stop_is_carried(
    bench: Any, new_disk: Any, irq: str
) -> None:
    old = new_disk()
    bench.serve(old, "a-dev")
    bench.start("a", irq=irq)
    new = new_disk(old.content)
    bench.serve(new, "b-dev")
    bench.start("b", incoming=True, irq=irq)

    async def body() -> None:
        async with await connect(bench, "a") as source, await connect(bench, "b") as target:
            await reads(source, 20)
            uri = f"unix:{bench.path('stream')}"
            await target.start_incoming(uri)
            await source.start_outgoing(uri)
            old.hold()
            while True:
                before = await guest_report(source)
                if before["outstanding"] == 4:
                    break
                await trio.sleep(0.01)
            await source.allow_switchover(300)
            await source.wait_pre_switchover()
            old.hold(False)
            await source.continue_switchover()
            await target.wait_loaded()
            new.take_over(old)
            new.hold()
            # Nobody fires anything here.
            await target.resume()
            while True:
                report = await guest_report(target)
                if report["operations"] >= before["operations"] + 4:
                    break
                await trio.sleep(0.01)
            assert report["failure"] == ""

    run(body)


STATES = ["running", "paused", "active", "pre-switchover", "postmigrate", "failed"]


async def bring_into(state: str, bench: Any, source: Vmm, target: Vmm) -> None:
    """Brings a running source into one of `STATES`."""
    if state == "running":
        return
    if state == "paused":
        await source.execute("stop")
        return
    uri = f"unix:{bench.path('stream')}"
    if state != "failed":
        await target.start_incoming(uri)
    await source.start_outgoing(uri)
    if state == "failed":
        with pytest.raises(MigrationFailed) as failure:
            await source.wait_pre_switchover()
        assert failure.value.status == "failed"
        assert failure.value.description
        return
    await copied(source)
    if state == "active":
        return
    await source.allow_switchover(300)
    await source.wait_pre_switchover()
    if state == "postmigrate":
        await source.continue_switchover()
        await source.wait_completed()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("by", ["driver", "recover_source"])
def test_i8_a_source_comes_back_from_every_state(
    bench: Any, new_disk: Any, state: str, by: str
) -> None:
    disk = new_disk()
    bench.serve(disk, "a-dev")
    bench.start("a")
    bench.serve(new_disk(disk.content), "b-dev")
    bench.start("b", incoming=True)
    needed = {
        "running": "the guest was running",
        "failed": "the guest was running",
        "paused": "the guest is paused by somebody and is left so",
        "active": "migrate_cancel from active",
        "pre-switchover": "migrate_cancel from pre-switchover",
        "postmigrate": "cont from postmigrate",
    }

    async def body() -> None:
        async with await connect(bench, "b") as target:
            source = await connect(bench, "a")
            await reads(source, 10)
            await bring_into(state, bench, source, target)
            if by == "driver":
                await source.cancel_and_resume(5.0)
            else:
                # As after a kill: the connection just ends.
                await source.aclose()
                done = await trio.to_thread.run_sync(recover_source, bench.path("a"), 5.0)
                assert done == needed[state]
                source = await connect(bench, "a")
            if state == "paused":
                assert await source.run_state() == "paused"
                await source.resume()
            assert await source.run_state() == "running"
            report = await reads(source, 20)
            assert report["failure"] == "" and report["io_errors"] == 0
            # And it can be migrated once more, as far as a target goes.
            await source.check_source()
            await source.start_outgoing(f"unix:{bench.path('nobody')}")
            with pytest.raises(MigrationFailed):
                await source.wait_pre_switchover()
            await source.aclose()

    run(body)


def test_a_target_that_dies_in_pre_switchover_leaves_the_source_running(
    bench: Any, new_disk: Any
) -> None:
    disk = new_disk()
    bench.serve(disk, "a-dev")
    bench.start("a")
    bench.serve(new_disk(disk.content), "b-dev")
    guest = bench.start("b", incoming=True)

    async def body() -> None:
        async with await connect(bench, "a") as source, await connect(bench, "b") as target:
            await reads(source, 10)
            await bring_into("pre-switchover", bench, source, target)
            guest.kill()
            with pytest.raises(VmmGone):
                await target.wait_loaded()
            await source.continue_switchover()
            with pytest.raises(MigrationFailed) as failure:
                await source.wait_completed()
            assert failure.value.status == "failed"
            assert await source.run_state() == "running"
            report = await reads(source, 20)
            assert report["failure"] == ""

    run(body)


def test_cancelling_while_the_stream_is_stuck(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    bench.serve(disk, "a-dev")
    bench.start("a")

    async def body() -> None:
        async with await connect(bench, "a") as source:
            await reads(source, 10)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(bench.path("stream"))
                listener.listen(1)
                await source.start_outgoing(f"unix:{bench.path('stream')}")
                sent, stuck = -1, False
                while not stuck:
                    progress = await source.progress()
                    stuck = progress.rounds > 0 and progress.transferred_bytes == sent
                    sent = progress.transferred_bytes
                    await trio.sleep(0.1)
                await source.cancel_and_resume(5.0)
            assert (await source.progress()).status == "cancelled"
            await reads(source, 20)

    run(body)


def hello(options: Any, writer: StreamWriter) -> bytes:
    return writer.hello(options.geometry())


def other_hello(options: Any, writer: StreamWriter) -> bytes:
    return writer.hello({**options.geometry(), "block_bytes": 8192})


def half_a_stream(options: Any, writer: StreamWriter) -> bytes:
    return hello(options, writer) + writer.state({"driver": {}})[:20]


def senseless_state(options: Any, writer: StreamWriter) -> bytes:
    return hello(options, writer) + writer.state({"irqs": 2, "latched": [7]}) + writer.end()


def garbage(_options: Any, _writer: StreamWriter) -> bytes:
    return b"QEVM\0\0\0\3" * 4


@pytest.mark.parametrize("make", [hello, other_hello, half_a_stream, senseless_state, garbage])
def test_i9_a_bad_stream_fails_the_incoming_not_the_process(
    bench: Any, new_disk: Any, make: Callable[[Any, StreamWriter], bytes]
) -> None:
    bench.serve(new_disk(), "b-dev")
    bench.start("b", incoming=True)

    async def body() -> None:
        async with await connect(bench, "b") as target:
            path = bench.path("stream")
            await target.start_incoming(f"unix:{path}")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sender:
                sender.connect(path)
                sender.sendall(make(bench.options("b"), StreamWriter()))
                sender.shutdown(socket.SHUT_WR)
                with pytest.raises(MigrationFailed) as failure:
                    await target.wait_loaded()
            assert failure.value.description.startswith("StreamError")
            assert await target.run_state() == "inmigrate"
            with pytest.raises(VmmNotReady):
                await target.check_source()

    run(body)


def test_commands_that_do_not_fit_the_state_are_refused(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    bench.serve(disk, "a-dev")
    bench.start("a")
    bench.serve(new_disk(disk.content), "b-dev")
    bench.start("b", incoming=True)

    async def refused(vmm: Vmm, command: str, arguments: dict[str, Any]) -> None:
        with pytest.raises(VmmRefused) as refusal:
            await vmm.execute(command, arguments)
        assert refusal.value.command == command

    async def body() -> None:
        async with await connect(bench, "a") as source, await connect(bench, "b") as target:
            uri = {"uri": f"unix:{bench.path('stream')}"}
            await refused(source, "migrate-incoming", uri)
            await refused(source, "migrate", {"uri": "tcp:somewhere:1"})
            await refused(source, "migrate-continue", {"state": "pre-switchover"})
            await refused(source, "migrate-set-parameters", {"downtime-limit": -1})
            await refused(source, "migrate-set-capabilities", {"capabilities": [{}]})
            await refused(source, "no-such-command", {})
            await refused(target, "migrate", uri)
            await target.start_incoming(uri["uri"])
            await refused(target, "migrate-incoming", uri)
            await source.start_outgoing(uri["uri"])
            await refused(source, "migrate", uri)
            await source.allow_switchover(300)
            await source.wait_pre_switchover()
            await refused(source, "cont", {})
            await source.continue_switchover()
            await source.wait_completed()
            await refused(source, "migrate", uri)
            await target.wait_loaded()
            with pytest.raises(VmmNotReady):
                await target.check_target()

    run(body)


def test_recovery_says_what_it_cannot_do(bench: Any, new_disk: Any) -> None:
    bench.serve(new_disk(), "b-dev")
    bench.start("b", incoming=True)
    with pytest.raises(VmmNotReady, match="inmigrate"):
        recover_source(bench.path("b"), DEADLINE_S)
    with pytest.raises(VmmGone):
        recover_source(bench.path("nobody"), 0.1)


def test_recovery_waits_for_a_connection_that_lingers(bench: Any, new_disk: Any) -> None:
    bench.serve(new_disk(), "a-dev")
    bench.start("a")

    async def body() -> None:
        source = await connect(bench, "a")
        await source.execute("stop")
        results: list[str] = []

        async def recover() -> None:
            results.append(await trio.to_thread.run_sync(recover_source, bench.path("a"), 10.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(recover)
            await trio.sleep(0.1)
            assert not results
            await source.aclose()
        assert results == ["the guest is paused by somebody and is left so"]

    run(body)
