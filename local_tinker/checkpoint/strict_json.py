"""JSON that means one thing: no NaN, no duplicate or non-string keys, no values that come back different."""

from __future__ import annotations

import json
import math
from typing import Any

from ..errors import CheckpointError


def dump_json(value: Any, *, where: str = "meta") -> bytes:
    """Canonical JSON bytes of `value`; raises CheckpointError naming what JSON cannot hold. Tuples become lists."""
    return (json.dumps(plain(value, where=where), sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def plain(value: Any, *, where: str = "meta") -> Any:
    """`value` as JSON would return it."""
    if value is None or isinstance(value, bool | str):
        return value
    # Subclasses such as numpy.float64 or an IntEnum are reduced to the plain number.
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where} is {value}: JSON has no NaN or infinity; store None or leave it out")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item, where=f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}: JSON keys are strings; convert it before saving")
        return {key: plain(item, where=f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(f"{where} is a {type(value).__name__}: use None, bool, int, float, str, list or dict")


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON; raises ValueError on NaN, Infinity, duplicate keys, bad UTF-8 or absurd nesting."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} appears twice")
    return result
