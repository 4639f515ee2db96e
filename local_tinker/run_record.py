"""What a run.json must hold to be read: a file that was edited or damaged is told from one that `Run` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Kinds of what a record holds, and of what a session and the facts that may be absent do; None may also be missing.
_KINDS = {
    **dict.fromkeys(("id", "name", "status", "created"), str),
    "cause": str | None,
    "config": Mapping,
    "sessions": list,
    **dict.fromkeys(("data", "seeds", "versions"), Mapping | None),
}
_SESSION = {"seconds": int | float | None}
_FACTS = {
    "git": {"commit": str, "dirty": bool},
    "best": {"metric": str, "value": int | float, "step": int, "folder": str},
}


def what_is_wrong(record: Any) -> str:
    """What of a run.json is missing or of another kind than `Run` writes; or nothing."""
    sessions = record.get("sessions")
    entries = {f"sessions[{i}]": entry for i, entry in enumerate(sessions)} if isinstance(sessions, list) else {}
    parts = [("", record, _KINDS), *((f"{name}.", entry, _SESSION) for name, entry in entries.items())]
    parts += [(f"{name}.", record[name], _FACTS[name]) for name in _FACTS if record.get(name) is not None]
    for where, part, kinds in parts:
        if not isinstance(part, Mapping):
            return f"{where.rstrip('.')} is {part!r}"
        for name, kind in kinds.items():
            if not isinstance(part.get(name), kind):
                return f"{where}{name} is {part[name]!r}" if name in part else f"{where}{name} is missing"
    return "" if sessions else "sessions is []"
