"""The forms a batch may come in -> a list of one kind of thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DatasetError, UsageError
from ..types import Completion, Datum, Rollout
from .rows import Row, RowSource

FORMS = (
    "rows (a list of dicts), a dict of equal-length columns, strings, a tensor dict (input_ids, attention_mask, "
    "labels), Datums, or completions of a sampler"
)


@dataclass(frozen=True)
class Batch:
    """`kind` is "rows", "texts", "tensors", "datums", "pairs" or "rollouts"; `items` are of that kind."""

    kind: str
    items: list[Any]


def sort_batch(batch: Any) -> Batch:
    """What was given, told apart by its types; a mixture is refused.

    Raises:
        UsageError: for what is no batch. DatasetError: columns of unequal length.
    """
    if isinstance(batch, Mapping):
        if "input_ids" in batch:
            return Batch("tensors", [batch])
        return Batch("rows", rows_of_columns(batch))
    if isinstance(batch, str | bytes | Datum | Rollout) or _is_datum(batch):
        raise UsageError(f"got one {type(batch).__name__}; a batch is a list: [it]. A batch may be {FORMS}")
    try:
        items = list(batch)
    except TypeError:
        raise UsageError(f"got {type(batch).__name__} as a batch; it may be {FORMS}") from None
    if not items:
        raise UsageError(f"the batch is empty; it may be {FORMS}")
    # Groups, as sample_batch(prompts, n=8) returns them.
    if all(isinstance(group, list) and group and all(map(_is_rollout, group)) for group in items):
        items = [sample for group in items for sample in group]
    kinds = {_kind(item) for item in items}
    if len(kinds) > 1 or None in kinds:
        found = ", ".join(sorted({type(item).__name__ for item in items}))
        raise UsageError(f"got a batch of {found}; it may be {FORMS}")
    kind = kinds.pop()
    if kind == "datums":
        items = [Datum.coerce(item) for item in items]
    elif kind == "pairs":
        items = [tuple(Datum.coerce(side) for side in pair) for pair in items]
    elif kind == "rows":
        items = [_with_source(row, index) for index, row in enumerate(items)]
    return Batch(kind, items)


def _kind(item: Any) -> str | None:
    if _is_rollout(item):
        return "rollouts"
    if isinstance(item, str):
        return "texts"
    if _is_datum(item):
        return "datums"
    if isinstance(item, tuple | list) and len(item) == 2 and all(map(_is_datum, item)):
        return "pairs"
    if isinstance(item, Mapping):
        return "tensors" if "input_ids" in item else "rows"
    return None


def _is_rollout(item: Any) -> bool:
    return isinstance(item, Completion | Rollout)


def _is_datum(item: Any) -> bool:
    return hasattr(item, "model_input") and hasattr(item, "loss_fn_inputs")


def _with_source(row: Mapping[str, Any], index: int) -> Row:
    source = getattr(row, "source", None)
    return Row(row, source=source if isinstance(source, RowSource) else RowSource(f"row {index} of the batch"))


def rows_of_columns(columns: Mapping[str, Any]) -> list[Row]:
    """A dict of columns -> rows. Message lists that a default collate function turned inside out are turned back."""
    lists: dict[str, Any] = {}
    for name, column in columns.items():
        column = column.tolist() if hasattr(column, "tolist") else column
        collated = isinstance(column, Mapping) and bool(column) and not _holds_scalars(column)
        if not collated and (isinstance(column, str | Mapping) or not isinstance(column, Sequence)):
            raise _one_row(f"column {name!r} is a {type(column).__name__}")
        lists[name] = dict(column) if collated else list(column)
    size = _size(lists)
    if not size and any(lists.values()):
        raise _one_row(f"column {next(name for name in lists if lists[name])!r} holds one conversation")
    rows = {name: _uncollate(column, size, name) for name, column in lists.items()}
    lengths = {name: len(column) for name, column in rows.items()}
    if len(set(lengths.values())) > 1:
        raise DatasetError(f"columns of unequal length: {', '.join(f'{k} {v}' for k, v in lengths.items())}")
    if not size:
        raise UsageError("the batch is empty: its columns have no rows")
    return [
        Row({name: rows[name][index] for name in rows}, source=RowSource(f"row {index} of the batch"))
        for index in range(size)
    ]


def _one_row(what: str) -> UsageError:
    return UsageError(f"{what}: a dict as a batch holds equal-length columns. For one row give a list: [row]")


def _size(lists: Mapping[str, Any]) -> int:
    """Rows of the batch: a collated message column is as long as a conversation, its innermost lists as the batch."""
    for column in lists.values():
        if isinstance(column, list) and not (column and isinstance(column[0], Mapping)):
            return len(column)
    return max((_leaf_length(column) for column in lists.values()), default=0)


def _leaf_length(value: Any) -> int:
    while isinstance(value, Mapping | list | tuple) and len(value):
        inner = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
        if isinstance(value, list | tuple) and not isinstance(inner, Mapping | list | tuple):
            return len(value)
        value = inner
    return len(value) if isinstance(value, list | tuple) else 0


def _uncollate(column: Any, size: int, name: str) -> list[Any]:
    if isinstance(column, Mapping):
        return [_pick(column, row) for row in range(size)]
    if not (column and isinstance(column[0], Mapping)):
        return column
    if not all(isinstance(turn, Mapping) for turn in column):
        raise DatasetError("a column that mixes objects and other values", field=name)
    # One dict a turn, each value holding one entry a row: the inside-out form.
    if all(_leaf_length(turn) == size and not _holds_scalars(turn) for turn in column):
        return [[{key: _pick(values, row) for key, values in turn.items()} for turn in column] for row in range(size)]
    return column


def _holds_scalars(turn: Mapping[str, Any]) -> bool:
    return any(
        not isinstance(value, Mapping | list | tuple) and not hasattr(value, "tolist") for value in turn.values()
    )


def _pick(value: Any, row: int) -> Any:
    """Row `row` of a collated value: lists lie innermost, one entry a row."""
    if isinstance(value, Mapping):
        return {key: _pick(item, row) for key, item in value.items()}
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping | list | tuple):
        return [_pick(item, row) for item in value]
    value = value.tolist() if hasattr(value, "tolist") else value
    return value[row]
