"""Prints, as constraints for pip, the lowest version of each dependency that pyproject.toml allows.

python -m tests.lowest_versions pyproject.toml
"""

import re
import sys
import tomllib
from pathlib import Path


def lowest(pyproject: str) -> list[str]:
    """`name==version` for each dependency of the product. Raises `ValueError` for one without a
    lower bound."""
    found = []
    for line in tomllib.loads(pyproject)["project"]["dependencies"]:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", line)
        if match is None:
            raise ValueError(f"{line!r} has no lower bound alone")
        found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    print("\n".join(lowest(Path(sys.argv[1]).read_text())))
