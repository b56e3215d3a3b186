"""The link is lost again and again while a guest under load moves, and the migration ends right.

Real processes; what is cut, made silent or shut is a proxy in front of `receive`.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from ferry.errors import Exit
from lab.testbed import Host, Process, Testbed
from tests.e2e.cut_link import Link
from tests.e2e.two_hosts import (
    MIGRATION_S,
    Method,
    assert_sound,
    new_bed,
    small_setup,
    start_both,
)

METHOD = Method()
LANES = 2
WINDOW_FRAMES = 4
SLOWLY = ("--bandwidth", "20M")
"""So that the first pass takes some seconds."""
BUSY = ("--iops", "1500")
"""Of what such a guest writes more is left after each round than a millisecond allows."""


@contextmanager
def linked(
    bed: Testbed, *flags: str, link_flags: tuple[str, ...] = ()
) -> Iterator[tuple[Host, Host, Process, Process, Link]]:
    """A migration that has begun to send pages: hosts, `send`, `receive`, and what is between."""
    a, b = start_both(bed)
    receiver = bed.receive(b, "--listen", "tcp://127.0.0.1:0", *link_flags)
    link = Link(int(receiver.wait_event("listening")["url"].rpartition(":")[2]))
    try:
        to = ("--to", f"tcp://127.0.0.1:{link.proxy.port}")
        sender = bed.send(a, b, *METHOD.flags, *SLOWLY, *to, *link_flags, *flags)
        sender.wait_event("progress")
        yield a, b, sender, receiver, link
    finally:
        link.close()


def events(process: Process, name: str) -> list[dict[str, object]]:
    return [event for event in process.events if event["event"] == name]


def wait_for(ready: Callable[[], object], process: Process) -> None:
    deadline = time.monotonic() + MIGRATION_S
    while not ready():
        assert time.monotonic() < deadline and process.running, process.tail()
        time.sleep(0.02)


def assert_moved(bed: Testbed, b: Host, sender: Process, receiver: Process) -> dict[str, int]:
    """Both sides say so, the guest runs there and lost nothing; what became of the messages."""
    assert sender.wait(MIGRATION_S) == Exit.OK, (sender.tail(), receiver.tail())
    assert receiver.wait(MIGRATION_S) == Exit.OK, (sender.tail(), receiver.tail())
    assert_sound(bed, b)
    counts: dict[str, int] = sender.wait_event("report")["link"]
    return counts


@pytest.mark.parametrize(
    ("n_cuts", "encrypted"),
    [
        (10, False),
        pytest.param(100, False, marks=pytest.mark.full),
        pytest.param(30, True, marks=pytest.mark.full),
    ],
)
def test_i3_i4_cut_again_and_again_a_migration_ends_right(
    short_path: Path, n_cuts: int, encrypted: bool
) -> None:
    """Nothing is lost, and no more is sent twice than was under way at each cut."""
    flags: tuple[str, ...] = ()
    if encrypted:
        secret = short_path / "secret"
        secret.write_text("5a" * 32 + "\n")
        secret.chmod(0o600)
        flags = ("--secret", str(secret))
    steered = ("--control-socket", str(short_path / "steer"))
    endless = ("--downtime-limit", "1", "--max-rounds", "100000", *steered)
    rng = random.Random(n_cuts)
    with (
        new_bed(short_path, small_setup(METHOD, *BUSY)) as bed,
        linked(bed, *endless, link_flags=flags) as (_, b, sender, receiver, link),
    ):
        cuts = 0
        while cuts < n_cuts:
            which = None if rng.random() < 0.5 else rng
            cuts += link.do(partial(link.proxy.cut, which))
            time.sleep(rng.random() * 0.2)
            assert sender.running, sender.tail()
        steering = bed.start("set", "set", "--downtime-limit", "300", *steered)
        assert steering.wait(MIGRATION_S) == Exit.OK, steering.tail()
        counts = assert_moved(bed, b, sender, receiver)
    assert 0 < counts["resumed"] <= cuts
    assert counts["repeated_messages"] <= cuts * LANES * WINDOW_FRAMES
    lost, resumed = (
        [event for event in events(sender, "link") if event["state"] == state]
        for state in ("lost", "resumed")
    )
    assert len(resumed) == len(lost) and resumed[-1]["times"] == counts["resumed"]


@pytest.mark.full
def test_a_link_that_falls_silent_is_made_anew(short_path: Path) -> None:
    """Half open: no end of a connection is told to anybody."""
    with (
        new_bed(short_path, small_setup(METHOD)) as bed,
        linked(bed, link_flags=("--peer-timeout", "1")) as (_, b, sender, receiver, link),
    ):
        link.do(link.proxy.fall_silent)
        counts = assert_moved(bed, b, sender, receiver)
    assert counts["resumed"] >= 1
    assert any("silent" in str(event.get("reason")) for event in events(sender, "link"))


@pytest.mark.full
def test_i8_a_link_that_does_not_come_back_leaves_the_guest_where_it_is(short_path: Path) -> None:
    with (
        new_bed(short_path, small_setup(METHOD)) as bed,
        linked(bed, link_flags=("--resume-window", "2")) as (a, _, sender, receiver, link),
    ):
        link.shut()
        assert (sender.wait(MIGRATION_S), receiver.wait(MIGRATION_S)) == (
            Exit.PEER_LOST,
            Exit.PEER_LOST,
        )
        assert "could not be made anew" in sender.events[-1]["message"]
        assert_sound(bed, a)


@pytest.mark.full
def test_a_receive_that_was_killed_and_started_anew_is_not_resumed(short_path: Path) -> None:
    with (
        new_bed(short_path, small_setup(METHOD)) as bed,
        linked(bed) as (a, b, sender, receiver, link),
    ):
        receiver.kill()
        wait_for(lambda: events(sender, "link"), sender)
        assert b.guest is not None
        b.guest.kill()
        bed.start_guest(b, incoming=True)
        again = bed.receive(b, "--listen", "tcp://127.0.0.1:0")
        port = int(again.wait_event("listening")["url"].rpartition(":")[2])
        link.do(lambda: link.proxy.to(port))
        assert sender.wait(MIGRATION_S) == Exit.PEER_LOST, sender.tail()
        assert "does not know this session" in sender.events[-1]["message"]
        assert_sound(bed, a)
        assert again.running
