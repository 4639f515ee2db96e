"""The seeded bugs of tests/battery/bugs: reading them, and planting one in a copy of the tree."""

from __future__ import annotations

import os
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "battery" / "bugs"
# What the tests read besides the package.
_COPIED = (
    "local_tinker",
    "tests",
    "recipes",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "Makefile",
)


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")

    def plant(self, folder: Path) -> None:
        """Copy the tree to `folder`, with this bug in it."""
        for name in _COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("results"))
            elif source.exists():
                shutil.copy2(source, folder / name)
        path = folder / "local_tinker" / self.file
        text = path.read_text()
        assert text.count(self.find) == 1
        path.write_text(text.replace(self.find, self.replace))
        os.utime(path, (1, 1))  # another time than any compiled file was made for


def bugs() -> list[Bug]:
    found = []
    for path in sorted(FOLDER.glob("*.toml")):
        found += [Bug(**{**each, "tests": tuple(each["tests"])}) for each in tomllib.loads(path.read_text())["bug"]]
    return found
