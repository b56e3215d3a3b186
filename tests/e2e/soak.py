"""`make soak`: migrations there and back for a long time, with a fault at random in each.

Whatever happens, each run ends within `RUN_S` with one owner, found by the documented procedure,
whose guest runs alone, goes on with its I/O and has lost none of it. What was done is counted and
told at the end, as JSON; a run that does not hold ends the soak with exit code 1, and with the seed
that repeats its choices.

A fault is a function in `FAULTS`, which strikes a migration that is under way. To add one, write it
there, and say in its docstring what it does; what it kills is started again by `Soak.revive`.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from ferry.errors import Exit
from lab.testbed import Host, Process, Setup, Testbed, TestbedError
from sync.gateway.control.client import GatewayClient
from sync.gateway.engine.records import Fate
from sync.gateway.errors import UpgradeFailed
from tests.e2e.cut_link import Link
from tests.e2e.two_hosts import GUEST, METHODS, assert_sound, run_resolve, start_both

RUN_S = 180.0
"""No run takes longer from its first process to its verdict."""
LATEST_S = 4.0
"""A fault strikes within so much time after `send` was started."""
HAS_GUEST = (Fate.OWNED, Fate.ABOUT_TO_RUN, Fate.RUNNING)
WINDOW_S = 10.0
WAIT_S = 20.0
"""A sender may be struck before it has come."""
PEER_TIMEOUT_S = 3


@dataclass
class Moving:
    """A migration under way, of which everything may be struck."""

    rng: random.Random
    bed: Testbed
    source: Host
    target: Host
    sender: Process
    receiver: Process
    link: Link

    def pause(self, process: Process | None, seconds: float) -> None:
        """The process stands still for so long, if it is there."""
        if process is not None and process.running:
            process.signal(signal.SIGSTOP)
            time.sleep(seconds)
            process.signal(signal.SIGCONT)


def has_been(process: Process, phase: str) -> bool:
    return any(event.get("phase") == phase for event in process.events)


def fate_at(host: Host) -> Fate | None:
    """Of the session that the host's gateway had last. A process that has stopped changes it no
    more."""

    async def ask() -> Fate | None:
        async with await GatewayClient.connect(host.control_socket) as gateway:
            return gateway.info.sessions.get(gateway.info.session)

    return trio.run(ask)


def nothing(_: Moving) -> None:
    """The migration has to succeed."""


def stop(process: Process) -> None:
    """It does nothing more from here on, if it has not ended."""
    process.signal(signal.SIGSTOP)
    with suppress(TestbedError):
        process.wait_stopped()


def kill_send(moving: Moving) -> None:
    moving.sender.kill()


def kill_receive(moving: Moving) -> None:
    moving.receiver.kill()


def kill_target(moving: Moving) -> None:
    """The target's VMM, gateway or device dies. An owner would take the guest along, so `receive`
    stands still while it is looked whether the commit has come."""
    host = moving.target
    victim = moving.rng.choice([host.guest, host.gateway, host.device])
    assert victim is not None
    if moving.receiver.running:
        stop(moving.receiver)
        if fate_at(host) not in HAS_GUEST:
            victim.kill()
        moving.receiver.resume()


def restart_device(moving: Moving) -> None:
    """The source's device dies, and is started again by a service manager sooner or later."""
    device = moving.source.device
    assert device is not None
    device.kill()
    time.sleep(moving.rng.random() * 2)
    moving.bed.start_device(moving.source)


def replace_device(moving: Moving) -> None:
    """Either side's device is changed to another process, unless a migration has the gateway."""
    host = moving.rng.choice([moving.source, moving.target])
    command = moving.bed.replace_device(host, f"device{moving.rng.randrange(1 << 30)}")
    assert command.wait(0) in (Exit.OK, Exit.DEVICE), command.tail()


def upgrade_gateway(moving: Moving) -> None:
    """Either side's, unless a migration has it."""
    with suppress(UpgradeFailed):
        moving.bed.upgrade_gateway(moving.rng.choice([moving.source, moving.target]))


def stop_send_for_good(moving: Moving) -> None:
    """It hangs, and its gateway ends it; before it has touched anything, nobody but we does, nor
    afterwards."""
    if not has_been(moving.sender, "precopy"):
        moving.sender.kill()
    elif moving.sender.running:
        stop(moving.sender)
        if fate_at(moving.source) is Fate.MOVED:
            moving.sender.resume()


def stop_somebody(moving: Moving) -> None:
    """Somebody stands still for up to two seconds, and goes on."""
    source, target = moving.source, moving.target
    processes = [moving.sender, moving.receiver, target.guest, target.gateway, target.device]
    processes += [source.gateway, source.device]
    moving.pause(moving.rng.choice(processes), moving.rng.random() * 2)


def interrupt(moving: Moving) -> None:
    """Ctrl-C at either side."""
    process = moving.rng.choice([moving.sender, moving.receiver])
    if process.running:
        process.signal(signal.SIGINT)


def cut_link(moving: Moving) -> None:
    """One connection or all of them, several times."""
    for _ in range(moving.rng.randrange(1, 8)):
        moving.link.do(partial(moving.link.proxy.cut, moving.rng.choice([None, moving.rng])))
        time.sleep(moving.rng.random() * 0.3)


def silence_link(moving: Moving) -> None:
    """What is connected carries nothing more, and nobody is told."""
    moving.link.do(moving.link.proxy.fall_silent)


def shut_link(moving: Moving) -> None:
    """For a while, or for good."""
    moving.link.shut()
    if moving.rng.random() < 0.5:
        time.sleep(moving.rng.random() * WINDOW_S / 2)
        moving.link.open()


FAULTS: tuple[Callable[[Moving], None], ...] = (
    *(nothing, kill_send, kill_receive, kill_target, stop_send_for_good, stop_somebody),
    *(interrupt, cut_link, silence_link, shut_link),
    *(restart_device, replace_device, upgrade_gateway),
)


class Soak:
    """A guest that goes to and fro between two hosts."""

    def __init__(self, bed: Testbed, rng: random.Random) -> None:
        self._bed = bed
        self._rng = rng
        self._owner, self._other = start_both(bed)
        self.counts: Counter[str] = Counter()
        self.longest_s = 0.0
        self.fault = ""
        """The name of the latest one."""

    def run(self, number: int) -> None:
        """One migration with one fault, settled and proven; the owner of the next run is found."""
        began = time.monotonic()
        fault = self._rng.choice(FAULTS)
        self.fault = fault.__name__
        moving = self._start()
        try:
            time.sleep(self._rng.random() * LATEST_S)
            fault(moving)
            codes = self._codes(moving, began + RUN_S)
        finally:
            moving.link.close()
        owner = self._settle(moving, codes)
        other = moving.target if owner is moving.source else moving.source
        self._prove(owner, other)
        took_s = time.monotonic() - began
        assert took_s < RUN_S, f"a run with {fault.__name__} took {took_s:.0f} s"
        moved = "moved" if owner is moving.target else "stayed"
        self.counts.update([fault.__name__, moved, f"{fault.__name__}: {moved}"])
        self.longest_s = max(self.longest_s, took_s)
        self._owner, self._other = owner, other
        print(f"run {number}: {fault.__name__}, {moved}, exit codes {codes}, {took_s:.1f} s")
        sys.stdout.flush()

    def _start(self) -> Moving:
        source, target = self._owner, self._other
        self.revive(target)
        if target.guest is not None and target.guest.running:
            target.guest.kill()
        self._bed.start_guest(target, incoming=True)
        limits = ("--peer-timeout", PEER_TIMEOUT_S, "--resume-window", WINDOW_S)
        waits = ("--wait", WAIT_S, "--listen", "tcp://127.0.0.1:0")
        receiver = self._bed.receive(target, *limits, *waits)
        link = Link(int(receiver.wait_event("listening")["url"].rpartition(":")[2]))
        method = self._rng.choice(METHODS)
        to = ("--to", f"tcp://127.0.0.1:{link.proxy.port}", "--bandwidth", "20M")
        sender = self._bed.send(source, target, *method.flags, *limits, *to)
        return Moving(self._rng, self._bed, source, target, sender, receiver, link)

    @staticmethod
    def _codes(moving: Moving, until: float) -> tuple[int, int]:
        """How both commands ended. Raises `TestbedError` if one does not."""
        ended = [
            process.wait(max(1.0, until - time.monotonic()))
            for process in (moving.sender, moving.receiver)
        ]
        return ended[0], ended[1]

    def _settle(self, moving: Moving, codes: tuple[int, int]) -> Host:
        """Who owns the guest, as an operator finds out by the documents."""
        assert Exit.INTERNAL not in codes, (moving.sender.tail(), moving.receiver.tail())
        if Exit.OK in codes:
            return moving.target
        self.revive(moving.target)
        if not has_been(moving.sender, "committing"):
            return moving.source
        settled = run_resolve(self._bed, moving.target, "--role", "target")
        if settled["outcome"] == "committed":
            return moving.target
        if codes[0] not in (Exit.PEER_ABORTED, Exit.DEVICE, Exit.VMM):
            verdict = ("--role", "source", "--verdict", settled["verdict"])
            assert run_resolve(self._bed, moving.source, *verdict)["outcome"] == "owned"
        return moving.source

    def _prove(self, owner: Host, other: Host) -> None:
        """The guest runs at `owner` alone, and none of its I/O was lost."""
        self._bed.wait_status(owner, "running", 60.0)
        if other.guest is not None and other.guest.running:
            assert self._bed.status(other) != "running"
        assert_sound(self._bed, owner)

    def revive(self, host: Host) -> None:
        """Starts what is dead of a host, but for its VMM, as a service manager would."""
        for process, start in (
            (host.device, self._bed.start_device),
            (host.gateway, self._bed.start_gateway),
        ):
            if process is not None and not process.running:
                start(host)
                self.counts["revived"] += 1


def soak(minutes: float, seed: int) -> int:
    """Runs until the time is over; returns the exit code."""
    until = time.monotonic() + 60 * minutes
    rng = random.Random(seed)
    setup = Setup(device=("--v2", "--logging", "4096"), guest=GUEST, image_bytes=16 << 20)
    number = 0
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        Testbed(Path(folder) / "bed", setup) as bed,
    ):
        soak_ = Soak(bed, rng)
        while time.monotonic() < until:
            number += 1
            try:
                soak_.run(number)
            except Exception:
                print(f"run {number} failed with {soak_.fault}; --seed {seed} repeats", flush=True)
                raise
    counts = dict(sorted(soak_.counts.items()))
    told = {"runs": number, "longest_s": round(soak_.longest_s, 1), "seed": seed, "counts": counts}
    print(json.dumps(told, indent=2))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = (
        arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    )
    return soak(arguments.minutes, seed)


if __name__ == "__main__":
    sys.exit(main())
