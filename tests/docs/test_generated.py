"""The documents say what the code says: generated parts, paths, exit codes, events, invariants."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import generate
from ferry.errors import Exit
from sync.handover.machine import TABLES
from sync.handover.states import Role
from transport.session import greeting

HOUSE = Path(__file__).parents[2]
PRODUCT = ("transport", "sync", "ferry")
DOCUMENTS = [*generate.documents(), *sorted(HOUSE.glob("*.md")), HOUSE / "perf" / "README.md"]

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(HOUSE))


def sources(*rooms: str) -> Iterator[tuple[Path, str]]:
    for room in rooms:
        for path in sorted((HOUSE / room).rglob("*.py")):
            yield path, path.read_text(encoding="utf-8")


def text_of(name: str) -> str:
    return (generate.FOLDER / name).read_text(encoding="utf-8")


@document
def test_no_generated_part_is_stale(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert generate.rendered(text) == text, "run: python -m docs.generate"


def test_every_part_that_can_be_made_stands_somewhere() -> None:
    used = [part for path in generate.documents() for part in generate.parts_of(path.read_text())]
    assert set(used) == set(generate.PARTS)


@pytest.mark.parametrize("role", Role)
def test_a_diagram_has_every_way_from_a_state_to_another(role: Role) -> None:
    """Counted from the table, not by the code that draws."""
    diagram = generate.handover(role)
    edges = set(re.findall(r"(\w+) --> (\w+)", diagram))
    for frame, body in re.findall(r"state (\w+) \{(.*?)\}", diagram, re.DOTALL):
        members = {name for edge in re.findall(r"(\w+) --> (\w+)", body) for name in edge}
        ends = {end for start, end in edges if start == frame}
        edges |= {(member, end) for member in members for end in ends}
    for state, row in TABLES[role].items():
        for event, way in row.items():
            if way.state is not state:
                assert (state.name, way.state.name) in edges, event


@pytest.mark.parametrize("rows", [greeting.SENDER, greeting.RECEIVER], ids=["sender", "receiver"])
def test_the_greetings_diagram_has_every_way_from_a_state_to_another(rows: greeting.Table) -> None:
    edges = set(re.findall(r"(\w+) --> (\w+)", generate.greeting_of(rows, next(iter(rows)))))
    for state, row in rows.items():
        for way in row.values():
            assert way.state is state or (state.name, way.state.name) in edges


def test_the_table_of_exit_codes_has_exactly_those_that_there_are() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text_of("operations.md"), re.MULTILINE)
    assert rows == [(str(code.value), code.name.lower()) for code in Exit]


def test_every_event_is_listed() -> None:
    section = text_of("operations.md").partition("## Events")[2].partition("### ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}
    sent = set()
    for path, source in sources("ferry", "sync/gateway"):
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Call)
                and re.search(r"(?:\.event|log|log_state)$", ast.unparse(node.func))
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                sent.add(str(node.args[0].value))
            if isinstance(node, ast.keyword) and node.arg == "event" and path.name != "progress.py":
                sent |= {str(node.value.value)} if isinstance(node.value, ast.Constant) else set()
    assert {"phase", "report", "mediated", "lease-lost"} <= sent
    assert sent - {""} <= listed


def test_every_invariant_that_the_code_cites_is_explained() -> None:
    explained = {
        int(number) for number in re.findall(r"^### I(\d+):", text_of("architecture.md"), re.M)
    }
    assert explained == set(range(1, 13))
    for path, source in sources(*PRODUCT, "lab"):
        cited = {int(number) for number in re.findall(r"\bI(\d+)\b(?=[),.;]|\s)", source)}
        assert cited <= explained, path


def test_every_invariant_has_tests_of_its_name() -> None:
    named = {
        int(number)
        for _, source in sources("tests")
        for number in re.findall(r"def test_(?:i\d+_)*i(\d+)_", source)
    }
    assert set(range(1, 13)) <= named


@document
def test_what_a_document_names_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w./-]+\.(?:py|toml|md|sh))`", text):
        if "/" in name:
            assert (HOUSE / name).exists(), name
    for name in re.findall(r"`((?:transport|sync|ferry|lab|perf)/[\w/]*)`", text):
        assert (HOUSE / name).exists(), name
    for name in re.findall(r"`((?:transport|sync|ferry|lab|perf)(?:\.\w+)+)`", text):
        assert _is_there(name), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (path.parent / link).exists(), link


def _is_there(dotted: str) -> bool:
    """Whether it is a module, or something in one."""
    attributes: list[str] = []
    module = dotted
    while module:
        try:
            if importlib.util.find_spec(module) is not None:
                break
        except ModuleNotFoundError:
            pass
        module, _, last = module.rpartition(".")
        attributes.insert(0, last)
    found = importlib.import_module(module) if module else None
    for name in attributes:
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return found is not None
