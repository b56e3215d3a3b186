"""What both ends of a migration have in common: signals, phases, the exit code, devices, tunnel."""

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import trio

from ferry.cli import describe, exit_code_of
from ferry.errors import Exit, Interrupted, LocalError, NotOwner
from ferry.messages import DeviceOffer
from ferry.progress import Reporter
from ferry.runner import Runner
from sync.gateway.client import GatewayClient
from sync.gateway.info import GatewayInfo
from sync.handover import Event
from sync.handover_states import State
from transport.errors import TransportError
from transport.kernels.compiled import warm_up
from transport.link import Link

TUNNEL_BYTES = 256 << 10
"""One read of the VMM's stream."""


@dataclass(frozen=True)
class Shell:
    """Reports the phases and ends them on a signal. `break_at` names the phase in which the
    process stops itself, for failure drills; SIGCONT lets it go on."""

    reporter: Reporter
    break_at: str

    async def on_state(self, state: State) -> None:
        self.reporter.event("phase", phase=state.value)
        if state.value == self.break_at:
            os.kill(os.getpid(), signal.SIGSTOP)

    async def watch_signals(
        self, runner: Runner, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                name = signal.Signals(number).name
                runner.post(Event.INTERRUPTED, Interrupted(f"stopped by {name}"))


def break_at_choices() -> tuple[str, ...]:
    return tuple(state.value for state in State)


_EXIT_OF_STATE = {
    State.IN_DOUBT: Exit.IN_DOUBT,
    State.BROKEN: Exit.BROKEN,
    State.OWNER_FAILED: Exit.OWNER_FAILED,
}


def conclude(reporter: Reporter, state: State, runner: Runner, advice: dict[State, str]) -> Exit:
    """The exit code for a terminal `state`; tells the user what went wrong and what to do."""
    if state in (State.COMMITTED, State.CHECKED):
        return Exit.OK
    error = runner.first_error
    reason = describe(error) if error is not None else "no reason is known"
    if runner.cleanup_error not in (None, error):
        reason += f"; then {describe(runner.cleanup_error)}"
    if not reason.endswith((".", "?")):
        reason += "."
    # What is said of the guest is not so where it was not this host's to begin with.
    hint = "" if isinstance(error, NotOwner) else advice.get(state, "")
    code = _EXIT_OF_STATE.get(state)
    if code is None:
        code = exit_code_of(error) if error is not None else Exit.INTERNAL
    reporter.event(
        "error",
        message=f"{reason} {hint}".strip(),
        state=state.value,
        exit_code=int(code),
        exit_name=code.name.lower(),
    )
    return code


class Kernels:
    """The compiled kernels, made ready while a command finds those that it needs."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._loaded = trio.Event()

    async def load(self) -> None:
        """Where they have to be compiled first, says that it takes a while."""
        await trio.to_thread.run_sync(warm_up, self._explain, abandon_on_cancel=True)
        self._loaded.set()

    async def ready(self) -> None:
        await self._loaded.wait()

    def _explain(self) -> None:
        text = "compiling the kernels, once on each machine: some seconds"
        self._reporter.event("message", text=text)


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """Around a nursery whose tasks fail together for one reason: raises the first error alone, also
    when the nursery is being cancelled, so that who waits for an error sees one."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors, _ = group.split(Exception)
        if errors is None:
            raise
        raise first_error(errors) from group


@contextlib.asynccontextmanager
async def alongside(task: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """`task` runs until the block ends, or is given up with it. Raises the first error of both."""
    with ungrouped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            yield
            nursery.cancel_scope.cancel()


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: parts of one phase fail together for one reason."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def offer_of(info: GatewayInfo, registers: bytes) -> DeviceOffer:
    """What the greeting says about a device."""
    identity = info.identity
    return DeviceOffer(
        identity={
            "vendor": identity.vendor,
            "device": identity.device,
            "subsystem_vendor": identity.subsystem_vendor,
            "subsystem": identity.subsystem,
            "revision": identity.revision,
            "class_code": identity.class_code,
        },
        regions=[[index, region.size] for index, region in sorted(info.regions.items())],
        irqs=[[index, irq.count] for index, irq in sorted(info.irqs.items())],
        registers=registers.hex(),
    )


async def check_gateway(path: str, client: GatewayClient, *, vmm: bool) -> GatewayInfo:
    """Its status, if it can take part in a migration. Raises `LocalError` where it cannot."""
    info = await client.status()
    if not info.device_connected:
        raise LocalError(f"the gateway at {path} has no device: start the device and try again")
    if vmm and not info.vmm_connected:
        raise LocalError(f"no VMM is connected to the gateway at {path}: start it and try again")
    return info


async def tunnel_out(
    stream: trio.SocketStream, link: Link, complete: Callable[[], Awaitable[bool]] | None
) -> None:
    """From the VMM on this host to the other one, until the VMM closes or is gone.

    `complete` is asked then. The end of a stream that broke off is not passed on: the other VMM
    would fail of it, and its host would see that before it hears the reason.
    """
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(TUNNEL_BYTES):
            await link.tunnel_send(data)
    if complete is None or await complete():
        await link.tunnel_send_eof()


async def tunnel_in(stream: trio.SocketStream, link: Link) -> None:
    """From the other host's VMM to the one here, until the other one closes.

    A VMM that has closed its end has what it wants, or has failed; its QMP says which. The peer's
    stream is read to its end all the same, or the peer would wait for room.
    """
    gone = False
    while data := await link.tunnel_receive():
        if not gone:
            try:
                await stream.send_all(data)
            except trio.BrokenResourceError:
                gone = True
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_eof()


async def run_tunnel(
    stream: trio.SocketStream,
    link: Link,
    runner: Runner,
    complete: Callable[[], Awaitable[bool]] | None = None,
) -> None:
    """Both directions of the VMM's stream. A link that breaks is the peer's loss.

    `complete` says, when the VMM has closed its end, whether the other host may hear of it.
    """
    try:
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(tunnel_out, stream, link, complete)
            nursery.start_soon(tunnel_in, stream, link)
    except* TransportError as group:
        runner.post(Event.PEER_LOST, first_error(group))
