"""`vfio-ferry resolve`: settles what became of a guest after `send` or `receive` could not finish.

A session's record at the deciding gateway is the truth, whatever came later; this reads it and does
the one thing that it allows. The target's record either says that the guest may have run there,
or that it never will. Of either it gives a proof, and only with that the source goes on.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial

import trio

from ferry.config import option, socket_path
from ferry.errors import ConfigError, Exit, FerryError
from ferry.migration.belonging import prove_one_vm
from ferry.progress import Reporter
from sync.gateway.control.client import GatewayClient
from sync.gateway.control.requests import Verdict
from sync.gateway.engine.custody import ClientRole
from sync.gateway.engine.records import COMMITTED, FENCED, Fate
from sync.gateway.errors import GatewayError, UnknownSession
from sync.vmm.driver import Vmm
from sync.vmm.errors import VmmGone
from sync.vmm.recover import recover_source

DEADLINE_S = 10.0
_MOVED = frozenset({Fate.RELEASED, Fate.MOVED, Fate.VOUCHED, Fate.ABOUT_TO_RUN, Fate.RUNNING})
"""After a session that ended so, whose the guest was before is over."""
_TO_VOUCH = frozenset({Fate.RELEASED, Fate.MOVED, Fate.VOUCHED})
"""What an operator's word overrides; at a gateway of several it may have to be given again."""


class Unresolvable(FerryError):
    """The records here do not allow what was asked for; nothing was touched."""

    exit_code = Exit.REFUSED


@dataclass(frozen=True, kw_only=True)
class Options:
    gateway: tuple[str, ...] = option(
        "control socket of a device's gateway; once for each device of the VM",
        (),
        parse=socket_path,
        repeat=True,
    )
    session: str | None = option("the session to settle (default: the one in doubt)", None)
    qmp: str | None = option(
        "QMP socket of the VMM on this host; needed where it has to be set running",
        None,
        parse=socket_path,
    )
    role: str | None = option(
        "which side this host was: refused if the record says otherwise",
        None,
        choices=("source", "target"),
    )
    verdict: str | None = option(
        "source only: the proof that `resolve` gave on the target, VERDICT:SESSION:TOKEN", None
    )
    vouch_the_other_host_is_gone: bool = option(
        "source only: take the guest back without a proof. You vouch that it runs nowhere else and"
        " never will: the other host is off for good, or its VMM was ended and the guest did not"
        " move on",
        False,
    )
    vouch_one_vm: bool = option(
        "you vouch that --gateway and --qmp are of one VM, where nothing on this host can prove it",
        False,
    )
    end_vmm: bool = option(
        "target only: end a VMM here that still waits for a guest of a fenced session", False
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    if not options.gateway:
        raise ConfigError("--gateway is missing; see: vfio-ferry resolve --help")
    return trio.run(resolve, options, Reporter("resolve", as_json=options.json))


async def resolve(options: Options, reporter: Reporter) -> Exit:
    """Settles one session on this host. Raises what `exit_code_of` knows."""
    found = await _deciding(options.gateway, options.session or "")
    if options.role not in (None, found.role.value):
        raise Unresolvable(
            f"this host was the {found.role.value} of session {found.session}, not the "
            f"{options.role}"
        )
    told = options.verdict is not None or options.vouch_the_other_host_is_gone
    if found.role is ClientRole.TARGET:
        if told:
            raise Unresolvable(f"this host was the target of {found.session}: it needs no verdict")
        return await _settle_target(options, reporter, found)
    if options.end_vmm:
        raise Unresolvable(f"this host was the source of {found.session}: --end-vmm is not for it")
    return await _settle_source(options, reporter, found)


async def _deciding(paths: Sequence[str], session: str) -> Verdict:
    """The record that counts: of the gateway that decides, wherever it stands among `paths`."""
    verdicts: list[Verdict] = []
    for path in paths:
        async with await GatewayClient.connect(path) as gateway:
            with suppress(UnknownSession):
                verdict = await gateway.verdict(session)
                if gateway.info.lease and gateway.info.session == verdict.session:
                    command = "send" if verdict.role is ClientRole.SOURCE else "receive"
                    raise Unresolvable(
                        f"`{command}` still has session {verdict.session} under way: let it end, "
                        "or end it"
                    )
                verdicts.append(verdict)
    if not verdicts:
        raise Unresolvable(
            f"no gateway here has session {session} on record"
            if session
            else "no session is on record here: there is nothing to settle"
        )
    sessions = {each.session for each in verdicts}
    if len(sessions) > 1:
        raise Unresolvable(
            f"the gateways have several sessions on record ({', '.join(sorted(sessions))}): name "
            "one with --session"
        )
    for each in verdicts:
        if each.decides:
            return each
    raise Unresolvable(
        "the gateway whose record decides is missing: give --gateway for every device of the VM"
    )


def _tell(reporter: Reporter, found: Verdict, outcome: str, text: str, proof: str = "") -> Exit:
    reporter.event("message", text=text, outcome=outcome, session=found.session, verdict=proof)
    return Exit.OK


# --- the target ---


async def _settle_target(options: Options, reporter: Reporter, found: Verdict) -> Exit:
    session = found.session
    if found.fate is Fate.STANDBY:
        raise Unresolvable(f"session {session} is still being settled here: ask again")
    if found.fate in (Fate.OWNED, Fate.ABOUT_TO_RUN):
        await _complete(options, found)
        found = await _deciding(options.gateway, session)
    if found.fate is not Fate.FENCED:
        text = f"committed: session {session} brought the guest here, where it may have run"
    else:
        text = f"fenced: session {session} never ran the guest here, and never will"
        text += await _end_vmm(options)
    if found.proof:
        text += f". On the source: vfio-ferry resolve --session {session} --verdict {found.proof}"
    outcome = FENCED if found.fate is Fate.FENCED else COMMITTED
    return _tell(reporter, found, outcome, text, found.proof)


async def _complete(options: Options, found: Verdict) -> None:
    """Starts what the commit reached but nobody was left to start, the deciding gateway first: it
    puts it on record before any device moves. A session whose VMM is gone has settled by itself."""
    session = found.session
    waiting: list[tuple[bool, str]] = []
    has_vmm = False
    for path in options.gateway:
        async with await GatewayClient.connect(path) as gateway:
            info = gateway.info
            # A gateway that was started anew has a VMM of no session: it may be this guest's.
            has_vmm = has_vmm or (info.vmm_connected and info.session in (session, ""))
            if info.session == session and info.state == "standby":
                waiting.append((not (await gateway.verdict(session)).decides, path))
    if not has_vmm:
        return  # the guest was lost with it
    qmp = options.qmp
    if qmp is None:
        raise ConfigError("--qmp is missing: the guest has to be set running")
    async with await Vmm.connect(qmp) as vmm:
        await _prove_one_vm(options, vmm)
        state = await vmm.run_state()
        for _, path in sorted(waiting):
            async with await GatewayClient.connect(
                path, role=ClientRole.TARGET, session=session
            ) as gateway:
                await gateway.start()
        if state == "paused" and found.ran:
            await vmm.resume()
    for path in options.gateway:
        async with await GatewayClient.connect(
            path, role=ClientRole.TARGET, session=session
        ) as gateway:
            with suppress(GatewayError):
                await gateway.running(session)


async def _prove_one_vm(options: Options, vmm: Vmm) -> None:
    """Raises `Mismatch` unless `vmm` is that of the gateways, or somebody vouches for it (I11)."""
    async with AsyncExitStack() as stack:
        gateways = [
            await stack.enter_async_context(await GatewayClient.connect(path))
            for path in options.gateway
        ]
        await prove_one_vm(options.gateway, gateways, vmm, vouched=options.vouch_one_vm)


async def _prove_vmm(options: Options) -> None:
    if options.qmp is not None:
        async with await Vmm.connect(options.qmp) as vmm:
            await _prove_one_vm(options, vmm)


async def _prove_vmm_if_there(options: Options) -> None:
    """Before a record is changed; one that is gone is told afterwards."""
    with suppress(VmmGone):
        await _prove_vmm(options)


async def _end_vmm(options: Options) -> str:
    """Ends the VMM if that was asked for and it still waits: one that has left `inmigrate` holds a
    guest, whoever's it is."""
    if not options.end_vmm:
        return ""
    if options.qmp is None:
        raise ConfigError("--qmp is missing: which VMM is to be ended?")
    async with await Vmm.connect(options.qmp) as vmm:
        await _prove_one_vm(options, vmm)
        state = await vmm.run_state()
        if state != "inmigrate":
            return f". Its VMM is {state}, it waits no more: it was not ended"
        await vmm.quit()
    return ". Its VMM was ended"


# --- the source ---


async def _settle_source(options: Options, reporter: Reporter, found: Verdict) -> Exit:
    session = found.session
    word = (options.verdict or "").partition(":")[0]
    if word == COMMITTED and found.fate not in (Fate.RELEASED, Fate.MOVED):
        raise Unresolvable(
            f"session {session} is {found.fate.value} here: the guest belongs to this host. If the "
            "target has it, too, end it on one of them before anything else: two copies of a guest "
            "on one disk destroy it"
        )
    if found.fate is Fate.RELEASED and options.verdict is not None:
        if word == COMMITTED:
            await _each(options.gateway, session, _note_moved(session, options.verdict))
        elif word == FENCED:
            await _prove_vmm_if_there(options)
            await _take_back(options.gateway, session, options.verdict)
        else:
            raise ConfigError(f"--verdict has to begin with {FENCED} or {COMMITTED}")
    elif found.fate in _TO_VOUCH and options.vouch_the_other_host_is_gone:
        await _prove_vmm_if_there(options)
        await _vouch(options.gateway, session)
    found = await _deciding(options.gateway, session)
    if found.fate is Fate.RELEASED:
        reporter.event(
            "error",
            message=f"session {session} is in doubt: this side has let go of the guest and does "
            "not know whether the target took it. On the target: `vfio-ferry resolve --session "
            f"{session}`, which gives the --verdict for here. If that host never comes back, see "
            "--vouch-the-other-host-is-gone",
            outcome="in-doubt",
            session=session,
            exit_code=int(Exit.IN_DOUBT),
            exit_name=Exit.IN_DOUBT.name.lower(),
        )
        return Exit.IN_DOUBT
    if found.fate is Fate.MOVED:
        text = f"moved in session {session}: the target owns the guest; the VMM here may be ended"
        return _tell(reporter, found, "released", text)
    return await _run_again(options, reporter, found)


async def _run_again(options: Options, reporter: Reporter, found: Verdict) -> Exit:
    """The record says that this side keeps the guest: so its devices and its VMM have to run."""
    moved = False
    for path in options.gateway:
        async with await GatewayClient.connect(path) as gateway:
            info = gateway.info
            if info.lease:
                raise Unresolvable("another migration is under way here: let it end, or end it")
            if info.state == "released" and info.session == found.session and found.proof:
                # It let go before the one that decides, which then never did.
                await _take_back([path], found.session, found.proof)
                info = await gateway.status()
            moved = moved or info.owner == "released" or _moved_since(info.sessions, found.session)
    if moved:
        text = f"session {found.session} left the guest here; it has moved since"
        return _tell(reporter, found, "kept", text)
    done = "start it when the guest is to run"
    if options.qmp is not None:
        await _prove_vmm(options)
        recover = partial(recover_source, options.qmp, DEADLINE_S, ran=found.ran)
        done = await trio.to_thread.run_sync(recover)
    elif found.fate is Fate.LEAVING:
        raise ConfigError("--qmp is missing: the guest has to be set running")
    text = f"this side owns the guest; its VMM: {done}"
    return _tell(reporter, found, "owned", text)


def _moved_since(sessions: Mapping[str, Fate], session: str) -> bool:
    """Whether a guest has left or come here after `session`, by the latest sessions, of which it is
    one, or older than all of them."""
    names = list(sessions)
    later = names[names.index(session) + 1 :] if session in sessions else names
    return any(sessions[name] in _MOVED for name in later)


async def _take_back(paths: Sequence[str], session: str, proof: str) -> None:
    async def reclaim(gateway: GatewayClient) -> None:
        if gateway.info.state == "released":
            await gateway.reclaim(session, proof)
            await _open(gateway)

    await _each(paths, session, reclaim)


async def _vouch(paths: Sequence[str], session: str) -> None:
    async def vouch(gateway: GatewayClient) -> None:
        if gateway.info.state == "released":
            await gateway.vouch(session)
            await _open(gateway)

    await _each(paths, session, vouch)


async def _open(gateway: GatewayClient) -> None:
    if (await gateway.status()).state != "passthrough":
        await gateway.passthrough()


def _note_moved(session: str, proof: str) -> Callable[[GatewayClient], Awaitable[None]]:
    async def note(gateway: GatewayClient) -> None:
        await gateway.moved(session, proof)

    return note


async def _each(
    paths: Sequence[str], session: str, act: Callable[[GatewayClient], Awaitable[None]]
) -> None:
    """Does `act` at each gateway of this VM, as the source of `session`."""
    for path in paths:
        async with await GatewayClient.connect(
            path, role=ClientRole.SOURCE, session=session
        ) as gateway:
            await act(gateway)
