"""Say a thing once: fallbacks, dropped rows and decisions, each line one time a client family."""

from __future__ import annotations

import sys
from collections.abc import Callable


def to_stderr(line: str) -> None:
    """Progress and notices go to stderr; stdout belongs to results."""
    print(f"local-tinker: {line}", file=sys.stderr, flush=True)


class Notices:
    """Calls `write` with each distinct line once."""

    def __init__(self, write: Callable[[str], None] = to_stderr) -> None:
        self._write = write
        self._said: set[str] = set()

    def __call__(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._write(line)
