"""What callers hand to the clients: kinds of batches, optimiser settings, paths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checks import whole
from .errors import UsageError
from .keywords import hint
from .types import AdamParams, Completion, Rollout


def holds_rollouts(batch: Any) -> bool:
    """Completions or rollouts, flat or in groups; a group that holds plain text among them is one to refuse later."""
    if isinstance(batch, (str, Mapping)) or not isinstance(batch, Sequence):
        return False
    for item in batch:
        if isinstance(item, (Completion, Rollout)):
            return True
        if isinstance(item, (list, tuple)) and any(isinstance(one, (Completion, Rollout, str)) for one in item):
            return True
    return False


def adam_fields(params: Any) -> dict[str, Any]:
    """The fields of our or Tinker's AdamParams, or of a mapping."""
    fields = AdamParams.__dataclass_fields__
    if params is None:
        return {}
    if isinstance(params, Mapping):
        unknown = [name for name in params if name not in fields]
        if unknown:
            instead = hint(str(unknown[0]), fields)
            raise UsageError(f"optim_step has no setting {unknown[0]!r}{instead}; it takes {', '.join(fields)}")
        return dict(params)
    if not hasattr(params, "learning_rate"):
        raise UsageError(
            f"optim_step takes AdamParams or keywords, got {type(params).__name__}; write optim_step(learning_rate=...)"
        )
    return {name: getattr(params, name) for name in fields if hasattr(params, name)}


def kind_of(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "columns"
    try:
        return f"{type(next(iter(batch))).__name__}s"
    except (TypeError, StopIteration):
        return type(batch).__name__


def as_path(value: Any, wanted: str) -> Path:
    """A str or path-like as a Path.

    Args:
        wanted: what the path is of, for the message.
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise UsageError(f"{wanted} is a path, as a str or a pathlib.Path; got {value!r}")
    return Path(value)


def check_lengths(lengths: Any, longest: int) -> None:
    """Tokens a document, each a row that the client would train on."""
    if isinstance(lengths, str) or not isinstance(lengths, Iterable):
        raise UsageError(f"lengths must be a list of tokens a document, such as [2000, 500], got {lengths!r}")
    for i, value in enumerate(lengths):
        whole(f"lengths[{i}]", value, most=longest, why=", the client's max_length")


def plain_extra(extra: Any) -> dict[str, Any]:
    if extra is not None and not isinstance(extra, Mapping):
        raise UsageError(f"extra must be a dict of JSON values, such as batches(...).state(), got {extra!r}")
    return dict(extra or {})
