"""The buffers of a lane: none is written while libzmq may still send from it."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from transport.lanes import BufferPool


@given(
    st.integers(1, 4),
    st.lists(
        st.one_of(
            st.just(("take", 0)),
            st.tuples(st.sampled_from(["answer", "release", "unused"]), st.integers(0, 5)),
        ),
        max_size=60,
    ),
)
def test_a_buffer_is_free_once_it_was_answered_and_libzmq_let_go(
    n_buffers: int, steps: list[tuple[str, int]]
) -> None:
    pool = BufferPool(n_buffers, 16)
    seen: dict[int, Any] = {}
    written: list[int] = []  # with a task or the receiver
    held: dict[int, Any] = {}  # by libzmq, answered or not
    for action, which in steps:
        match action:
            case "take":
                buffer = pool.take()
                in_use = set(written) | set(held)
                assert (buffer is None) == (len(in_use) == n_buffers)
                if buffer is not None:
                    assert id(buffer) not in in_use
                    seen[id(buffer)] = buffer
                    written.append(id(buffer))
                    held[id(buffer)] = SimpleNamespace(done=False)
            case "answer" if written:
                answered = written.pop(which % len(written))
                pool.settle(seen[answered], held.get(answered))
            case "unused" if written:
                unused = written.pop(which % len(written))
                del held[unused]
                pool.settle(seen[unused])
            case "release":
                settled = [key for key in held if key not in written]
                if settled:
                    held.pop(settled[which % len(settled)]).done = True
    assert len(seen) <= n_buffers
