"""Writes those parts of the documents that follow from the code.

    python -m docs.generate            # rewrites them
    python -m docs.generate --check    # ends with 1 and names the documents that are stale

A part stands in a document between `<!-- generated: NAME -->` and `<!-- end -->`; `PARTS` says what
makes it. Diagrams come from the state tables, layouts from the docstrings of the modules that own
them, limits, exit codes, deadlines and options from the values that the code uses.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from ferry.cli import COMMANDS
from ferry.config import default_text, flag_of
from ferry.errors import Exit
from ferry.migration import messages
from ferry.migration.conversation import RULES
from ferry.versions import FORMATS, format_versions
from sync.gateway.control import requests as control_requests
from sync.gateway.control import wire as control_wire
from sync.gateway.engine import core, custody
from sync.gateway.errors import BY_CODE
from sync.handover.machine import TABLES, Action, Event
from sync.handover.states import TERMINAL, Deadlines, HandoverState, Role
from sync.registers import interface, payload, record
from sync.registers.profile import locate, model, toml
from sync.vmm import platform_state
from transport.session import greeting
from transport.wire import frames, records

FOLDER = Path(__file__).parent
_PART = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

WRONG = frozenset(
    {Event.FAILED, Event.PEER_LOST, Event.TIMEOUT, Event.INTERRUPTED, Event.PEER_ABORTED}
)
"""What most states treat alike; the diagrams call it `wrong`."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in lines
    )


def drawing(module: ModuleType, number: int = 0) -> str:
    """An indented block of a module's docstring, with the text between its parts: the `number`th
    of those that are set apart by text at the margin."""
    blocks: list[list[str]] = [[]]
    for line in (inspect.getdoc(module) or "").splitlines():
        if line.startswith("  ") or (not line and blocks[-1]):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    found = [block for block in blocks if any(line.strip() for line in block)]
    text = textwrap.dedent("\n".join(found[number])).strip("\n")
    return f"```text\n{text}\n```"


# --- state diagrams ---


def mermaid(edges: Iterable[str]) -> str:
    """A state diagram of these lines."""
    return "\n".join(["```mermaid", "stateDiagram-v2", *(f"    {edge}" for edge in edges), "```"])


def _label(events: Sequence[Event], actions: Sequence[Action]) -> str:
    names = [event.name for event in events]
    if set(events) >= WRONG:
        names = ["wrong", *(event.name for event in events if event not in WRONG)]
    label = ", ".join(names)
    return f"{label} / {', '.join(action.name for action in actions)}" if actions else label


def handover(role: Role) -> str:
    """One role's side of `sync.handover.machine`. States that all leave alike when something goes
    wrong stand in one frame; what is ignored is left out."""
    rows = TABLES[role]
    ways_out: dict[frozenset[Any], list[HandoverState]] = defaultdict(list)
    for state, row in rows.items():
        out = frozenset((event, way) for event, way in row.items() if event in WRONG)
        if len(out) == len(WRONG) and all(way.state is not state for _, way in out):
            ways_out[out].append(state)
    framed = {state: index for index, states in enumerate(ways_out.values()) for state in states}
    inside: dict[int, list[str]] = defaultdict(list)
    outside = ["[*] --> IDLE"]
    for state, row in rows.items():
        edges: dict[Any, list[Event]] = defaultdict(list)
        for event, way in row.items():
            leaves_frame = state in framed and event in WRONG
            if not leaves_frame and (way.state is not state or way.actions):
                edges[way].append(event)
        for way, events in edges.items():
            within = framed.get(state) == framed.get(way.state, -1)
            lines = inside[framed[state]] if within else outside
            lines.append(f"{state.name} --> {way.state.name} : {_label(events, way.actions)}")
    for index, (out, states) in enumerate(ways_out.items()):
        (way,) = {way for _, way in out}
        frame = f"on_the_way_{index + 1}"
        members = inside[index] or [state.name for state in states]
        outside += [f"state {frame} {{", *(f"    {line}" for line in members), "}"]
        outside.append(f"{frame} --> {way.state.name} : {_label([*WRONG], way.actions)}")
    outside += [f"{state.name} --> [*]" for state in rows if state in TERMINAL]
    return mermaid(outside)


def gateway_states() -> str:
    """`sync.gateway.engine.custody`, without what ends in the same state."""
    moves = [
        f"{state.value} --> {after.value} : {event.value}"
        for (state, event), after in custody.TRANSITIONS.items()
        if state is not after
    ]
    lost = [
        f"{state.value} --> {custody.CustodyState.PASSTHROUGH.value} : lease lost, {loss.value}"
        for (_, state), loss in custody.LEASE_LOSS.items()
        if state is not custody.CustodyState.PASSTHROUGH
    ]
    return mermaid([f"[*] --> {custody.CustodyState.PASSTHROUGH.value}", *moves, *lost])


def greeting_of(rows: greeting.Table, start: greeting.State) -> str:
    """One role's side of `transport.session.greeting`, without what ends in the same state."""
    edges = [f"[*] --> {start.name}"]
    for state, row in rows.items():
        ways: dict[greeting.State, list[str]] = defaultdict(list)
        for event, way in row.items():
            if way.state is not state:
                ways[way.state].append(event.name)
        edges += [f"{state.name} --> {to.name} : {', '.join(why)}" for to, why in ways.items()]
    return mermaid(edges)


# --- tables ---


def requests() -> str:
    """Who may send which request of the control protocol, and when."""
    return table(
        ["request", "fields", "from", "in the states"],
        (
            [
                f"`{name}`",
                _names_of(request),
                _all_of(custody.ClientRole, request.roles),
                _all_of(custody.CustodyState, request.states),
            ]
            for name, request in control_requests.REQUESTS.items()
        ),
    )


def _names_of(shape: Any) -> str:
    return ", ".join(f"`{field.name}`" for field in dataclasses.fields(shape))


def _all_of(kind: Any, chosen: Iterable[Any]) -> str:
    picked = set(chosen)
    return "any" if picked == set(kind) else ", ".join(each for each in kind if each in picked)


def control_errors() -> str:
    """The codes of the control protocol's errors."""
    return table(
        ["code", "what it says"],
        ([f"`{code}`", _first_line(cls)] for code, cls in BY_CODE.items()),
    )


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def conversation() -> str:
    """Which message the hearer may be told in which of its states, and how often."""
    rows = []
    for kind in messages.MessageKind:
        for role in Role:
            rule = RULES[role].get(kind)
            if rule is not None:
                often = "any number" if rule.at_most is None else str(rule.at_most)
                states = [_states(rule.heard_in), _states(rule.ignored_in)]
                rows.append([str(int(kind)), f"`{kind.name}`", role.value, *states, often])
    head = ["kind", "message", "said to the", "acted on in", "ignored in", "at most"]
    return table(head, rows)


def _states(chosen: Iterable[HandoverState]) -> str:
    return ", ".join(sorted(state.value for state in chosen))


def documented(enumeration: Any) -> str:
    """Numbers and names of an enumeration, with the docstrings that follow its members."""
    texts = _docstrings_of(enumeration)
    return table(
        ["number", "name", "what"],
        ([str(int(each)), f"`{each.name}`", texts.get(each.name, "")] for each in enumeration),
    )


def _docstrings_of(cls: Any) -> dict[str, str]:
    """What stands below each member of a class, by the member's name."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(cls)).body
        if isinstance(node, ast.ClassDef)
    )
    found = {}
    for member, text in pairwise(body):
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            name = re.match(r"\w+(?=:? )", ast.unparse(member))
            if name is not None:
                found[name[0]] = " ".join(str(text.value.value).split())
    return found


def exit_codes() -> str:
    return table(
        ["code", "name", "meaning"],
        ([str(int(code)), f"`{code.name.lower()}`", code.meaning] for code in Exit),
    )


def deadlines() -> str:
    """How long either side may stay in each state, where no option says otherwise."""
    limits = Deadlines()
    rows = []
    for state in HandoverState:
        sides = [role.value for role in Role if state in TABLES[role]]
        if state is HandoverState.IDLE or state in TERMINAL:
            continue
        seconds = limits.of(state)
        limit = "none" if seconds is None else f"{seconds:g} s"
        rows.append([f"`{state.value}`", " and ".join(sides), limit])
    return table(["state", "side", "limit"], rows)


def options() -> str:
    """Every option of every command, as the command line and a TOML file know it."""
    sections = []
    for name, command in COMMANDS.items():
        fields = dataclasses.fields(importlib.import_module(command.module).Options)
        rows = [[f"`{flag_of(field)}`", _default(field), _help(field)] for field in fields]
        head = f"### `{name}`: {command.help}"
        sections.append(f"{head}\n\n{table(['option', 'default', 'what'], rows)}")
    return "\n\n".join(sections)


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is False:
        return "off"
    text = default_text(field)
    return f"`{text}`" if text else ""


def _help(field: "dataclasses.Field[Any]") -> str:
    text: str = field.metadata["help"]
    choices = [choice for choice in field.metadata["choices"] if choice]
    if 0 < len(choices) < 10:
        text += f"; one of {', '.join(f'`{choice}`' for choice in choices)}"
    return text + ("; may be repeated" if field.metadata["repeat"] else "")


def versions() -> str:
    """Each format that crosses between hosts, or comes from a user, with its present version."""
    return table(
        ["format", "version", "constant"],
        (
            [what, str(version), f"`{constant}`"]
            for (what, constant), version in zip(FORMATS, format_versions().values(), strict=True)
        ),
    )


BOUNDS: list[tuple[ModuleType, str, str]] = [
    (records, "MAX_DATA_LANES", "data lanes of a session"),
    (records, "MIN_ANNOUNCED_FRAME_BYTES", "shortest frame length that a greeting may announce"),
    (records, "MAX_ANNOUNCED_FRAME_BYTES", "longest one"),
    (records, "MAX_WINDOW_FRAMES", "frames under way on a lane"),
    (records, "MAX_RECORD_BYTES", "payload of a record or a greeting"),
    (records, "MAX_TUNNEL_CHUNK_BYTES", "data of one TUNNEL message"),
    (records, "MIN_PEER_TIMEOUT_MS", "shortest silence that may count as a loss"),
    (records, "MAX_REASON_BYTES", "text of a BYE"),
    (records, "MAX_COMPARE_PAGES", "pages of one COMPARE or DIGEST"),
    (frames, "MAX_FRAME_PAGES", "pages of a frame"),
    (frames, "MAX_FRAME_BYTES", "bytes of a frame, unpacked"),
    (messages, "MAX_DEVICES", "devices of one VM"),
    (messages, "MAX_REGIONS", "regions of guest memory"),
    (payload, "MAX_BODY_BYTES", "body of one payload of register state"),
    (payload, "MAX_WHOLE_BYTES", "body that is put together from several"),
    (platform_state, "MAX_FUNCTIONS", "PCI functions in the state of a VMM"),
    (platform_state, "MAX_BLOB_BYTES", "the state of a VMM's devices"),
    (control_wire, "MAX_JSON_BYTES", "JSON of a control message"),
    (control_wire, "MAX_BLOB_BYTES", "blob of a control message"),
    (control_wire, "MAX_DESCRIPTORS", "descriptors with one control message"),
    (toml, "MAX_FILE_BYTES", "a profile's file"),
    (model, "MAX_REGISTERS", "registers of a profile"),
    (model, "MAX_BANK", "entries of a bank"),
    (model, "MAX_COPIED_BYTES", "a block that is read while the guest waits"),
]


def bounds() -> str:
    """What is refused when it is exceeded."""
    return table(
        ["bound", "value", "constant"],
        (
            [what, _amount(name, getattr(module, name)), f"`{module.__name__}.{name}`"]
            for module, name, what in BOUNDS
        ),
    )


def _amount(name: str, value: int) -> str:
    if not name.endswith("_BYTES"):
        return f"{value}" + (" ms" if name.endswith("_MS") else "")
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value % size == 0:
            return f"{value // size} {unit}"
    return f"{value} bytes"


def gateway_limits() -> str:
    """What bounds a gateway's waiting."""
    texts = _docstrings_of(core.Limits)
    rows = []
    for field in dataclasses.fields(core.Limits):
        unit = " s" if field.name.endswith("_s") else ""
        default = f"{field.default:g}{unit}" if unit else str(field.default)
        rows.append([f"`{field.name}`", default, texts.get(field.name, "")])
    return table(["limit", "default", "what"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "handover-source": partial(handover, Role.SOURCE),
    "handover-target": partial(handover, Role.TARGET),
    "gateway-states": gateway_states,
    "greeting-sender": partial(greeting_of, greeting.SENDER, greeting.State.CALLING),
    "greeting-receiver": partial(greeting_of, greeting.RECEIVER, greeting.State.LISTENING),
    "register-calls": partial(drawing, interface),
    "session-routing": partial(drawing, records, 0),
    "session-layouts": partial(drawing, records, 1),
    "frame-layout": partial(drawing, frames),
    "frame-codings": partial(documented, frames.Coding),
    "page-kinds": partial(documented, frames.PageKind),
    "handover-messages": partial(drawing, messages),
    "handover-rules": conversation,
    "payload-layout": partial(drawing, payload),
    "payload-kinds": partial(documented, payload.PayloadKind),
    "record-layout": partial(drawing, record),
    "platform-layout": partial(drawing, platform_state),
    "control-layout": partial(drawing, control_wire),
    "control-requests": requests,
    "control-errors": control_errors,
    "gateway-limits": gateway_limits,
    "profile-format": partial(drawing, toml),
    "profile-classes": partial(drawing, model),
    "profile-bases": partial(drawing, locate),
    "versions": versions,
    "bounds": bounds,
    "exit-codes": exit_codes,
    "deadlines": deadlines,
    "options": options,
}


def rendered(document: str) -> str:
    """`document` with each of its parts as the code has it now. Raises KeyError for a part that
    nothing makes."""
    return _PART.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]()}\n\n{match[3]}", document)


def parts_of(document: str) -> list[str]:
    """The names of the parts that stand in `document`."""
    return [match[2] for match in _PART.finditer(document)]


def documents() -> list[Path]:
    return sorted(FOLDER.glob("*.md"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the generated parts of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            stale.append(path)
            if not check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path.name}: {'is stale: run python -m docs.generate' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
