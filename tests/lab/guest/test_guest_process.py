"""A guest process with a device that behaves and with one that does not."""

import json
import os
import signal
import stat
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from lab.guest.control import guest_report, verify_guest
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmNotReady

DEADLINE_S = 20.0


def drive(path: str, body: Callable[[Vmm], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(DEADLINE_S):
            async with await Vmm.connect(path, deadline_s=DEADLINE_S) as vmm:
                await body(vmm)

    trio.run(main)


async def until(vmm: Vmm, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first report for which `condition` holds."""
    while True:
        report = await guest_report(vmm)
        if condition(report):
            return report
        await trio.sleep(0.01)


def assert_unharmed(report: dict[str, Any]) -> None:
    assert report["failure"] == "", report
    for name in ("checksum_errors", "buffer_errors", "io_errors", "access_errors"):
        assert report[name] == 0, report


@pytest.mark.parametrize("irq", ["msix", "intx"])
def test_it_boots_works_and_verifies(bench: Any, new_disk: Any, irq: str) -> None:
    disk = new_disk()
    bench.serve(disk, "g-dev")
    guest = bench.start("g", irq=irq, flush_every=8)

    async def body(vmm: Vmm) -> None:
        report = await until(vmm, lambda r: r["reads"] > 50 and r["flushes"] > 1)
        assert report["device_id"] == "fake-disk"
        assert report["writes"] > 8 and report["interrupts"] > 0
        verified = await verify_guest(vmm)
        assert verified["verification"]["state"] == "passed"
        assert verified["verification"]["blocks"] > 8
        assert verified["verification"]["buffers"] > 8
        assert_unharmed(verified)
        assert (await guest_report(vmm))["state"] == "running"
        await vmm.quit()

    drive(bench.path("g"), body)
    assert guest.wait(DEADLINE_S) == 0
    assert disk.resets == 1
    assert disk.roms == [(4 << 30) - (64 << 10)]
    assert disk.config[4] & 6 == 6
    assert disk.config[0x10:0x14] == (0xE0000000).to_bytes(4, "little")
    assert ("irqs 0x24 2 2" in disk.seen) == (irq == "msix")
    assert ("irqs 0x24 0 1" in disk.seen) == (irq == "intx")


def test_the_low_region_is_mapped_again_as_firmware_does_it(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["operations"] > 1)
        maps = [entry for entry in disk.seen if "map" in entry]
        assert maps == [
            "map 0x0",
            "map 0x100000",
            "map 0x100000000",
            "map 0xffff0000",
            "unmap 0x0",
            "map 0x0",
        ]

    drive(bench.path("g"), body)


def test_stopped_it_makes_no_access(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["operations"] > 10)
        await vmm.execute("stop")
        assert await vmm.run_state() == "paused"
        stop = vmm.client.last_event("STOP")
        assert stop is not None and stop.timestamp > 0
        # A notification of before the stop may still be on its way.
        await until(vmm, lambda _: disk.caught_up())
        served = disk.served
        operations = (await guest_report(vmm))["operations"]
        with disk.lock:
            disk.fire()
        for _ in range(5):
            await trio.sleep(0.02)
            assert (await guest_report(vmm))["operations"] == operations
        assert disk.served == served
        await vmm.resume()
        report = await until(vmm, lambda r: r["operations"] > operations + 10)
        assert_unharmed(report)

    drive(bench.path("g"), body)


def test_a_lost_interrupt_is_a_lost_request_until_the_next_one(bench: Any, new_disk: Any) -> None:
    """The guest is as strict as a real one: it does not look at the used ring by itself."""
    disk = new_disk()
    bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["operations"] > 10)
        with disk.lock:
            disk.mute = True
        # Muted, it still serves what is available, and nobody hears of it.
        operations = -1
        while (report := await guest_report(vmm))["operations"] != operations or (
            report["outstanding"] != 4
        ):
            operations = report["operations"]
            await trio.sleep(0.05)
        await vmm.execute("stop")
        await vmm.execute("cont")
        for _ in range(5):
            await trio.sleep(0.02)
            assert (await guest_report(vmm))["operations"] == operations
        with disk.lock:
            disk.mute = False
        disk.fire()
        await until(vmm, lambda r: r["operations"] > operations + 4)

    drive(bench.path("g"), body)


def test_what_the_device_does_wrong_is_counted(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["reads"] > 20)
        with disk.lock:
            disk.fail_next = 2
            disk.corrupt_next = 3
        report = await until(vmm, lambda r: r["io_errors"] == 2 and r["checksum_errors"] >= 3)
        assert len(report["notes"]) >= 5
        with disk.lock:
            first = bytes(disk.content)
            for at in range(0, len(first), 4096):
                disk.content[at + 100] ^= 0x55
        verified = await verify_guest(vmm)
        assert verified["verification"]["state"] == "failed"
        assert verified["verification"]["errors"] > 8

    drive(bench.path("g"), body)


def test_a_stale_page_is_found(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["reads"] > 50)
        await vmm.execute("stop")
        with disk.lock:
            # Not one of the last ones, which may still be in flight.
            page = sorted(disk.written)[-20]
            disk._put(page, bytes(4096))
        await vmm.resume()
        verified = await verify_guest(vmm)
        assert verified["verification"]["state"] == "failed"
        assert verified["buffer_errors"] == 1

    drive(bench.path("g"), body)


@pytest.mark.parametrize("irq", ["msix", "intx"])
def test_a_gateway_that_goes_and_comes_back_is_survived(
    bench: Any, new_disk: Any, irq: str
) -> None:
    disk = new_disk()
    end = bench.serve(disk, "g-dev")
    bench.start("g", irq=irq)

    async def body(vmm: Vmm) -> None:
        before = await until(vmm, lambda r: r["reads"] > 20)
        await trio.to_thread.run_sync(end)
        bench.serve(disk, "g-dev")
        report = await until(vmm, lambda r: r["reads"] > before["reads"] + 50)
        assert report["device_reconnects"] >= 1
        assert report["device_resets"] == 0
        assert_unharmed(await verify_guest(vmm))

    drive(bench.path("g"), body)


def test_a_device_that_lost_its_state_is_initialised_again(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    end = bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["reads"] > 20)
        with disk.lock:
            disk.hold()
        await until(vmm, lambda r: r["outstanding"] == 4)
        await trio.to_thread.run_sync(end)
        fresh = new_disk(disk.content)
        bench.serve(fresh, "g-dev")
        before = await guest_report(vmm)
        report = await until(vmm, lambda r: r["reads"] > before["reads"] + 50)
        assert report["device_resets"] == 1
        verified = await verify_guest(vmm)
        assert verified["verification"]["state"] == "passed"
        assert_unharmed(verified)

    drive(bench.path("g"), body)


def test_a_device_that_goes_while_the_guest_is_paused(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    end = bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        before = await until(vmm, lambda r: r["reads"] > 20)
        await vmm.execute("stop")
        await trio.to_thread.run_sync(end)
        bench.serve(disk, "g-dev")
        await until(vmm, lambda _: bool(disk.memory))
        await vmm.resume()
        report = await until(vmm, lambda r: r["reads"] > before["reads"] + 20)
        assert report["device_reconnects"] == 1
        assert_unharmed(report)

    drive(bench.path("g"), body)


def test_needs_reset_is_obeyed(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        before = await until(vmm, lambda r: r["reads"] > 20)
        disk.needs_reset()
        report = await until(vmm, lambda r: r["reads"] > before["reads"] + 50)
        assert report["device_resets"] == 1
        assert_unharmed(await verify_guest(vmm))

    drive(bench.path("g"), body)


def test_a_device_that_does_not_come_back_ends_the_guest_not_the_process(
    bench: Any, new_disk: Any
) -> None:
    disk = new_disk()
    end = bench.serve(disk, "g-dev")
    bench.start("g", device_deadline_s=0.2)

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["reads"] > 5)
        await trio.to_thread.run_sync(end)
        report = await until(vmm, lambda r: r["state"] == "internal-error")
        assert "did not come back" in report["failure"]
        with pytest.raises(VmmNotReady):
            await verify_guest(vmm)

    drive(bench.path("g"), body)


def test_a_device_that_breaks_the_ring_ends_the_guest(bench: Any, new_disk: Any) -> None:
    disk = new_disk()
    bench.serve(disk, "g-dev")
    bench.start("g")

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["reads"] > 5)
        with disk.lock:
            used = int.from_bytes(disk.common[48:56], "little")
            disk._put(used + 2, b"\xff\x7f")
            disk.fire()
        report = await until(vmm, lambda r: r["state"] == "internal-error")
        assert "GuestPanic" in report["failure"]

    drive(bench.path("g"), body)


def test_without_a_device_it_says_so(bench: Any) -> None:
    guest = bench.start("g", device_deadline_s=0.1)
    _, errors = guest.communicate(timeout=DEADLINE_S)
    assert guest.returncode == 1
    assert b"no device at" in errors
    assert not os.path.exists(bench.path("g"))  # noqa: PTH110


def test_sigterm_ends_it_cleanly_and_reports_are_json_lines(bench: Any, new_disk: Any) -> None:
    bench.serve(new_disk(), "g-dev")
    guest = bench.start("g", report_interval_s=0.05)

    async def body(vmm: Vmm) -> None:
        await until(vmm, lambda r: r["reads"] > 20)
        mode = (await trio.Path(bench.path("g")).stat()).st_mode
        assert stat.S_IMODE(mode) == 0o600
        line = await trio.to_thread.run_sync(guest.stdout.readline)
        assert json.loads(line)["state"] == "running"
        guest.send_signal(signal.SIGTERM)
        mark = 0
        while vmm.client.last_event("SHUTDOWN") is None:
            await vmm.client.wait_event(since=mark)
            mark = vmm.client.events_seen

    drive(bench.path("g"), body)
    assert guest.wait(DEADLINE_S) == 0
    assert not os.path.exists(bench.path("g"))  # noqa: PTH110
