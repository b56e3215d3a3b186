"""Any message of a VMM or a device, in any state, ends in a reply, a relayed message or a
`ProtocolError` for that connection: nothing else, and no descriptor is left behind."""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sync.gateway.engine import jobs
from sync.gateway.engine.custody import CustodyState
from sync.vfio_user.errors import ProtocolError
from sync.vfio_user.protocol import FLAG_NO_REPLY, FLAG_REPLY, Command, encode_message
from tests.sync.gateway.conftest import Bench
from tests.sync.gateway.mediation import mediate

PAGE = 4096
COMMANDS = st.sampled_from([*Command, 0, 14, 77, 0xFFFF])
MESSAGES = st.lists(
    st.tuples(
        COMMANDS,
        st.binary(max_size=60) | st.integers(0, 20).map(lambda n: n.to_bytes(16, "little")),
        st.sampled_from([0, FLAG_NO_REPLY, FLAG_REPLY]),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=8,
)


def _enter(bench: Bench, state: CustodyState) -> None:
    link, custody = bench.link, bench.custody
    if state is CustodyState.STANDBY:
        bench.job(jobs.standby(link, custody, "s"), held=True)
    elif state is not CustodyState.PASSTHROUGH:
        mediate(bench, "message")
    if state in (CustodyState.STOPPED, CustodyState.RELEASED):
        bench.job(jobs.stop(link, custody, fence=True, resume=b""), held=True)
    if state is CustodyState.RELEASED:
        custody.release("s")
        link.enter(custody.state)


@pytest.mark.parametrize("state", list(CustodyState))
@given(messages=MESSAGES)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_i9_any_message_of_a_vmm_in_any_state(
    make_bench: Callable[..., Bench],
    open_fds: Callable[[], int],
    state: CustodyState,
    messages: list[tuple[Command | int, bytes, int, int, bool]],
) -> None:
    ram = os.memfd_create("ram")
    os.ftruncate(ram, PAGE)
    before = open_fds()
    bench = make_bench(v2=True, logging=True)
    os.close(bench.share(0x10000, PAGE))
    _enter(bench, state)
    relay = bench.link.relay
    try:
        for command, body, flags, n_fds, step in messages:
            message = memoryview(bytearray(encode_message(3, command, body)))
            relay.from_vmm(3, command, flags, 0, message, [os.dup(ram) for _ in range(n_fds)])
            if step:
                bench.step()
        bench.settle()
    except ProtocolError:
        pass
    else:
        assert relay.vmm_error is not None or not relay.holding
    bench.close()
    assert open_fds() == before
    os.close(ram)


@pytest.mark.parametrize(
    "state", [CustodyState.PASSTHROUGH, CustodyState.MEDIATED, CustodyState.STANDBY]
)
@given(messages=MESSAGES, asked=st.lists(COMMANDS, max_size=3))
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_i9_any_message_of_a_device_in_any_state(
    make_bench: Callable[..., Bench],
    open_fds: Callable[[], int],
    state: CustodyState,
    messages: list[tuple[Command | int, bytes, int, int, bool]],
    asked: list[Command | int],
) -> None:
    """Replies of any length and with any errno to what the VMM has asked, and commands of its
    own."""
    ram = os.memfd_create("ram")
    before = open_fds()
    bench = make_bench()
    os.close(bench.share(0x10000, PAGE))
    _enter(bench, state)
    relay = bench.link.relay
    try:
        for command in asked:
            bench.vmm(command, bytes(24))
        for command, body, flags, n_fds, step in messages:
            number = int.from_bytes(bench.to_device[0][0][:2], "little") if bench.to_device else 9
            message = memoryview(bytearray(encode_message(number, command, body)))
            taken = [os.dup(ram) for _ in range(n_fds)]
            relay.from_device(number, command, flags, 5 if step else 0, message, taken)
            if flags == FLAG_REPLY and bench.to_device:
                bench.to_device.popleft()
    except ProtocolError:
        pass
    bench.close()
    assert open_fds() == before
    os.close(ram)
