"""Plain text for terminals, pipes and logs: results on stdout, the rest on stderr. No rich: it loads in 0.2 s."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

_CODES = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}


def colored(stream: TextIO) -> bool:
    """Whether colour codes belong on this stream: NO_COLOR, FORCE_COLOR and TERM=dumb decide before the terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str | None, stream: TextIO) -> str:
    if not style or not text.strip() or not colored(stream):
        return text
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def error(message: str) -> None:
    """One message on stderr."""
    print(f"{paint('error:', 'red', sys.stderr)} {message}", file=sys.stderr)


def note(message: str) -> None:
    """One line of progress or advice on stderr."""
    print(message, file=sys.stderr)


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    styles: dict[str, str] | None = None,
) -> str:
    """Aligned columns, two spaces apart, no lines and no wrapping: the same text on a terminal, in a pipe and in a log.

    Args:
        right: headers of the columns set flush right.
        styles: cell text -> colour.
    """
    styles = styles or {}
    widths = [max(len(line[i]) for line in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        out = []
        for cell, width, header in zip(cells, widths, headers, strict=True):
            padded = cell.rjust(width) if header in right else cell.ljust(width)
            out.append(paint(padded, styles.get(cell), sys.stdout))
        return "  ".join(out).rstrip()

    return "\n".join([paint(line(headers), "bold", sys.stdout), *(line(row) for row in rows)])


def gib(count: int) -> str:
    """Bytes as GiB with one decimal."""
    return f"{count / 2**30:.1f} GiB"
