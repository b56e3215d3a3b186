"""The table of field faults names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_each_line_is_held_by_tests_that_exist() -> None:
    table = (TESTS / "README.md").read_text().partition("## Field faults")[2]
    path = ""
    names = re.findall(r"`(\w[\w/]*\.py)?(?:::(test_\w+))?`", table)
    assert len(names) > 30
    for file, test in names:
        path = file or path
        text = (TESTS / path).read_text()
        assert not test or f"def {test}(" in text, f"{path}::{test}"
