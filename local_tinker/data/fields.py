"""Reading one column of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import messages as chat
from .rows import RowSource, fail


def string(row: Mapping[str, Any], name: str, source: RowSource | None, *, empty: bool = False) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise fail(f"expected a string, got {chat.type_name(value)} {value!r}"[:200], source=source, field=name)
    if not empty and not value.strip():
        raise fail("empty: nothing to train; leave the row out", source=source, field=name)
    return value


def tools(row: Mapping[str, Any], source: RowSource | None) -> list[dict[str, Any]] | None:
    return chat.tools_of(row.get("tools"), source=source)
