"""A session that is held, without a socket: both tables and both channels, over a link that loses.

The oracle knows only what each user said and took: each side's is the beginning of the other's,
always; and once the link is left alone, all of it. Nobody takes an honest peer for a liar.
"""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.session.channels import TUNNEL_WINDOW_BYTES, Conversation
from transport.session.greeting import RECEIVER, SENDER, Action, Event, Greeting, State
from transport.wire.errors import RecordError
from transport.wire.records import (
    MessageType,
    Position,
    Resumption,
    TunnelHead,
    message_type,
    resume_key,
    unpack_control,
    unpack_tunnel,
)

NOW = 1000.0
KEY = resume_key(bytes(16), bytes(16))
WINDOW_S = 60.0
Message = tuple[int, bytes, bytes | None]
"""The number of its link, its head, and what comes behind the head of a tunnel message."""


@dataclass
class Side:
    greeting: Greeting
    talk: Conversation
    link: int = 0
    control: deque[Message] = field(default_factory=deque)
    """What this side has sent and the other one has not read, in order; the tunnel's likewise."""
    tunnel: deque[Message] = field(default_factory=deque)
    tunnel_is_welcome: bool = True
    records: list[int] = field(default_factory=list)
    said: bytearray = field(default_factory=bytearray)
    said_end: bool = False
    heard_records: list[int] = field(default_factory=list)
    heard: bytearray = field(default_factory=bytearray)
    heard_end: bool = False

    def flush(self) -> None:
        """Sends what may go, as a control thread does."""
        if not self.greeting.allows(Event.ALIVE):
            return
        while (message := self.talk.next_control(NOW)) is not None:
            self.control.append((self.link, message, None))
        if not (self.greeting.allows(Event.LANE) and self.tunnel_is_welcome):
            return
        while (credit := self.talk.tunnel.next_credit()) is not None:
            self.tunnel.append((self.link, credit, None))
        while (next_ := self.talk.tunnel.next_message()) is not None:
            head, data = next_
            self.tunnel.append((self.link, head, None if data is None else bytes(data)))

    def take(self) -> None:
        """The user takes all that has arrived."""
        while (record := self.talk.records.take()) is not None:
            self.heard_records.append(int.from_bytes(record.payload, "little"))
        while data := self.talk.tunnel.take(5):
            self.heard += data
        self.heard_end |= data == b""


class World:
    def __init__(self) -> None:
        self.sender = Side(
            Greeting(SENDER, State.OPEN, {State.LOST: WINDOW_S}, NOW),
            Conversation(now=NOW, peer_timeout_s=5, pings=True, chunk_bytes=3),
        )
        self.receiver = Side(
            Greeting(RECEIVER, State.OPEN, {State.LOST: WINDOW_S}, NOW),
            Conversation(now=NOW, peer_timeout_s=5, pings=False, chunk_bytes=3),
        )
        assert self.sender.greeting.handle(Event.HOLD, NOW) == (Action.SAY_HOLD,)
        self.receiver.greeting.handle(Event.TOLD_HOLD, NOW)

    def step(self, who: str, what: str) -> None:
        side = self.sender if who == "sender" else self.receiver
        match what:
            case "record":
                number = len(side.records)
                if side.talk.records.try_queue(1, number.to_bytes(4, "little")):
                    side.records.append(number)
            case "pour" if not side.said_end:
                data = bytes([len(side.said) % 251 + 1]) * 7
                side.said += data[: side.talk.tunnel.try_queue(memoryview(data))]
            case "end":
                side.talk.tunnel.end()
                side.said_end = True
            case "flush":
                side.flush()
            case "take":
                side.take()
            case "read":
                self._read(side, side is self.sender)
            case "read tunnel":
                self._read_tunnel(side)
            case "lose" if side.greeting.allows(Event.LOSS):
                self._lose(side)
            case "connect" if side.greeting.state is State.LOST and side is self.sender:
                self._perform(side, Event.CONNECTED)
            case "stall" if side.greeting.allows(Event.STALLED):
                self._perform(side, Event.STALLED)
            case "join" if side.greeting.allows(Event.REJOINED) and side.tunnel_is_welcome:
                self._perform(side, Event.REJOINED)
            case "welcome" if self.sender.link == self.receiver.link:
                self.sender.tunnel_is_welcome = self.receiver.tunnel_is_welcome = True

    def _lose(self, side: Side) -> None:
        """This side finds the link lost. What is under way either way may or may not be read by
        the other one, which finds it later."""
        self._perform(side, Event.LOSS)

    def _perform(self, side: Side, event: Event, resumption: Resumption | None = None) -> None:
        for action in side.greeting.handle(event, NOW):
            match action:
                case Action.CALL_AGAIN:
                    side.link += 1
                    side.tunnel_is_welcome = False
                case Action.DROP_LINK:
                    side.tunnel_is_welcome = False
                case Action.SEND_RESUME:
                    resume = Resumption(MessageType.RESUME, side.link, side.talk.position)
                    side.control.append((side.link, resume.pack(KEY), None))
                case Action.REJOIN:
                    assert resumption is not None
                    side.talk.resume(resumption.position, NOW)
                case Action.TAKE_OVER:
                    assert resumption is not None
                    side.link = resumption.link
                    side.talk.resume(resumption.position, NOW)
                    resumed = Resumption(MessageType.RESUMED, side.link, side.talk.position)
                    side.control.append((side.link, resumed.pack(KEY), None))
                case Action.TELL_RESUMED:
                    pass
                case _:
                    raise AssertionError(action)

    def _read(self, side: Side, is_sender: bool) -> None:
        other = self.receiver if is_sender else self.sender
        if not other.control:
            return
        link, message, _ = other.control.popleft()
        kind = message_type(message)
        if is_sender:
            if link != side.link or side.greeting.state is State.LOST:
                return  # its socket is closed
            if kind == MessageType.RESUMED:
                told = Resumption.unpack(message, MessageType.RESUMED, KEY)
                self._perform(side, Event.RESUMED, told)
                return
        elif link != side.link or side.greeting.state is State.LOST:
            if link > side.link and kind == MessageType.RESUME:
                told = Resumption.unpack(message, MessageType.RESUME, KEY)
                self._perform(side, Event.RESUME, told)
            return
        side.greeting.handle(Event.ALIVE, NOW)
        side.talk.on_control(unpack_control(message), NOW)

    def _read_tunnel(self, side: Side) -> None:
        other = self.receiver if side is self.sender else self.sender
        if not other.tunnel:
            return
        link, head, data = other.tunnel.popleft()
        if link != side.link or not side.greeting.allows(Event.LANE):
            return
        side.greeting.handle(Event.LANE, NOW)
        message = unpack_tunnel(head)
        assert isinstance(message, TunnelHead) == (data is not None)
        side.talk.on_tunnel(message, data, NOW)

    def check(self, *, whole: bool = False) -> None:
        for says, hears in ((self.sender, self.receiver), (self.receiver, self.sender)):
            assert hears.heard_records == says.records[: len(hears.heard_records)]
            assert says.said.startswith(hears.heard)
            assert not hears.heard_end or (says.said_end and hears.heard == says.said)
            if whole:
                assert hears.heard_records == says.records
                assert hears.heard == says.said
                assert hears.heard_end == says.said_end

    def settle(self) -> None:
        """The link is left alone: both read and take until nothing moves any more."""
        for _ in range(40):
            if self.sender.greeting.state is not State.HELD:
                self.step("sender", "connect")
            self.step("sender", "welcome")
            self.step("sender", "join")
            for who, side in (("sender", self.sender), ("receiver", self.receiver)):
                side.flush()
                while self._other(side).control:
                    self.step(who, "read")
                while self._other(side).tunnel:
                    self.step(who, "read tunnel")
                side.take()

    def _other(self, side: Side) -> Side:
        return self.receiver if side is self.sender else self.sender


STEPS = [
    *((who, step) for who in ("sender", "receiver") for step in ("record", "pour", "flush")),
    *((who, step) for who in ("sender", "receiver") for step in ("take", "read", "read tunnel")),
    *((who, step) for who in ("sender", "receiver") for step in ("read", "flush")),
    *(("sender", step) for step in ("connect", "stall", "welcome", "join", "connect", "welcome")),
    ("sender", "lose"),
    ("receiver", "lose"),
]
ENDS = [("sender", "end"), ("receiver", "end")]
MOVES = st.lists(st.sampled_from(STEPS * 3 + ENDS), max_size=150)


@settings(max_examples=400, deadline=None)
@given(MOVES)
def test_whatever_is_lost_each_side_hears_all_of_the_other_once_and_in_order(
    moves: list[tuple[str, str]],
) -> None:
    world = World()
    for who, what in moves:
        world.step(who, what)
        world.check()
    # One that has not noticed the loss is told by the other's new link.
    if world.receiver.greeting.state is State.LOST and world.sender.greeting.state is State.HELD:
        world.step("sender", "lose")
    elif world.sender.greeting.state not in (State.HELD, State.LOST):
        world.step("sender", "stall")
    world.settle()
    world.check(whole=True)
    assert world.sender.greeting.state is world.receiver.greeting.state is State.HELD
    assert world.sender.link == world.receiver.link


@pytest.mark.parametrize("state", [State.LOST, State.RESUMING, State.REJOINING])
def test_the_window_counts_from_the_loss_and_not_from_each_attempt(state: State) -> None:
    greeting = Greeting(SENDER, State.HELD, {State.LOST: WINDOW_S}, NOW)
    greeting.handle(Event.LOSS, NOW)
    for at in range(1, 59):
        for event in (Event.CONNECTED, Event.RESUMED):
            if greeting.state is not state:
                greeting.handle(event, NOW + at)
        assert greeting.state is state and greeting.deadline == NOW + WINDOW_S
        greeting.handle(Event.STALLED, NOW + at)
    assert greeting.handle(Event.TIMEOUT, NOW + WINDOW_S) == (Action.END_NOT_RESUMED,)
    # A link that was whole again has all of the time once more.
    greeting = Greeting(SENDER, State.HELD, {State.LOST: WINDOW_S}, NOW)
    for event in (Event.LOSS, Event.CONNECTED, Event.RESUMED, Event.REJOINED):
        greeting.handle(event, NOW)
    assert greeting.deadline == float("inf")
    greeting.handle(Event.LOSS, NOW + 100)
    assert greeting.deadline == NOW + 100 + WINDOW_S


@pytest.mark.parametrize(
    "theirs",
    [
        Position(3, 0, False),
        Position(0, 0, False),
        Position(1, 2, False),
        Position(1, 9, False),
        Position(1, 7, True),
    ],
)
def test_i9_a_peer_that_resumes_where_it_never_was_breaks_the_protocol(theirs: Position) -> None:
    talk = Conversation(now=NOW, peer_timeout_s=5, pings=False, chunk_bytes=7)
    for _ in range(2):
        talk.records.try_queue(1, b"")
        talk.next_control(NOW)
    talk.on_control(unpack_control(b"\x04" + (1).to_bytes(8, "little") + bytes(8)), NOW)
    talk.tunnel.try_queue(memoryview(b"7 bytes"))
    talk.tunnel.next_message()
    with pytest.raises(RecordError):
        talk.resume(theirs, NOW)


def test_credit_that_was_lost_is_given_again_on_the_next_link() -> None:
    one, other = (
        Conversation(now=NOW, peer_timeout_s=5, pings=False, chunk_bytes=1 << 18) for _ in "ab"
    )
    # Less than what is worth a credit of its own later, so only the new link can give it.
    n_bytes, n_records = TUNNEL_WINDOW_BYTES // 8, 8
    assert one.tunnel.try_queue(memoryview(bytes(n_bytes))) == n_bytes
    for _ in range(n_records):
        assert one.records.try_queue(1, bytes(50_000))
    while (message := one.next_control(NOW)) is not None:
        other.on_control(unpack_control(message), NOW)
    while (piece := one.tunnel.next_message()) is not None:
        other.on_tunnel(unpack_tunnel(piece[0]), bytes(piece[1] or b""), NOW)
    while other.records.take() or other.tunnel.take(n_bytes):
        pass
    assert other.next_control(NOW) and other.tunnel.next_credit()  # which are lost
    assert other.tunnel.next_credit() is None

    one_at, other_at = one.position, other.position
    one.resume(other_at, NOW)
    other.resume(one_at, NOW)
    credits = [other.next_control(NOW), other.tunnel.next_credit()]
    assert credits[0] is not None and credits[1] is not None
    one.on_control(unpack_control(credits[0]), NOW)
    one.on_tunnel(unpack_tunnel(credits[1]), None, NOW)
    assert one.tunnel.try_queue(memoryview(bytes(2 * TUNNEL_WINDOW_BYTES))) == TUNNEL_WINDOW_BYTES
