"""The walls of the house: which room may import which, and that no files import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
MAY_IMPORT = {
    "transport": {"transport"},
    "sync": {"sync"},
    "ferry": {"ferry", "sync", "transport"},
    "lab": {"lab", "ferry", "sync", "transport"},
    "perf": {"perf", "lab", "ferry", "sync", "transport"},
}
MUST_NOT_IMPORT = [
    *(("sync.registers", f"sync.{other}") for other in ("gateway", "handover", "vmm", "dirty")),
    *(("sync.dirty", f"sync.{other}") for other in ("gateway", "handover", "vmm", "registers")),
    *(("sync.vmm", f"sync.{other}") for other in ("gateway", "handover", "dirty", "registers")),
    *(("sync.handover", f"sync.{other}") for other in ("gateway", "vmm", "dirty", "registers")),
    ("sync.gateway", "sync.handover"),
    ("sync.gateway", "sync.dirty"),
    ("sync.gateway.datapath", "sync.gateway.control"),
    ("transport.wire", "transport.session"),
    ("transport.kernels", "transport.session"),
]

Imports = dict[str, set[str]]


def read_imports(house: Path) -> Imports:
    """By module of the rooms below `house`: the modules of the rooms that it imports, wherever in
    the file."""
    files = {
        ".".join(path.relative_to(house).with_suffix("").parts).removesuffix(".__init__"): path
        for room in MAY_IMPORT
        for path in (house / room).rglob("*.py")
    }
    return {
        module: {name for name in _imported(path, files) if name != module}
        for module, path in files.items()
    }


def _imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for each in node.names:
                inner = f"{node.module}.{each.name}"
                yield inner if inner in modules else node.module


def breaches(imports: Imports) -> list[str]:
    """Every import through a wall, and a circle if there is one, in words."""
    found = []
    for module, imported in imports.items():
        for other in imported:
            room = module.partition(".")[0]
            through = other.partition(".")[0] not in MAY_IMPORT[room] or any(
                _inside(module, here) and _inside(other, there) for here, there in MUST_NOT_IMPORT
            )
            if through:
                found.append(f"{module} imports {other}")
    return found + _circle(imports)


def _inside(module: str, folder: str) -> bool:
    return module == folder or module.startswith(folder + ".")


def _circle(imports: Imports) -> list[str]:
    """What is left when all modules that import nothing of what is left have been taken away."""
    left = {module: set(imported) for module, imported in imports.items()}
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    if not left:
        return []
    way = [min(left)]
    while (after := min(left[way[-1]] & left.keys())) not in way:
        way.append(after)
    return [f"circle: {' -> '.join([*way[way.index(after) :], after])}"]


def test_no_wall_is_broken_and_no_files_import_each_other() -> None:
    imports = read_imports(HOUSE)
    assert len(imports) > 200
    assert breaches(imports) == []


@pytest.mark.parametrize(
    ("file", "text", "breach"),
    [
        ("transport/wire.py", "import sync.pci", "transport.wire imports sync.pci"),
        ("sync/pci.py", "from transport import wire", "sync.pci imports transport.wire"),
        ("sync/pci.py", "import lab.demo", "sync.pci imports lab.demo"),
        ("ferry/cli.py", "def run():\n    from lab.demo import run", "ferry.cli imports lab.demo"),
        ("lab/demo.py", "import perf.command", "lab.demo imports perf.command"),
        (
            "sync/registers/record.py",
            "from sync.gateway import errors",
            "sync.registers.record imports sync.gateway.errors",
        ),
        (
            "sync/pci.py",
            "from sync.gateway.errors import WrongState",
            "circle: sync.pci -> sync.gateway.errors -> sync.pci",
        ),
    ],
)
def test_a_broken_wall_is_seen(tmp_path: Path, file: str, text: str, breach: str) -> None:
    house = {
        "transport/wire.py": "",
        "sync/pci.py": "",
        "sync/registers/record.py": "",
        "sync/gateway/errors.py": "import sync.pci",
        "ferry/cli.py": "import sync.pci, transport.wire",
        "lab/demo.py": "from ferry import cli",
        "perf/command.py": "import lab.demo",
    }
    for name, content in (house | {file: text}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        (path.parent / "__init__.py").write_text("")
    assert breach in breaches(read_imports(tmp_path))
