"""A row and where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..errors import DatasetError


@dataclass(frozen=True)
class RowSource:
    """The file (or hub id) a row was read from and its 1-based line, or its number where the file has no lines."""

    path: str
    line: int | None = None

    def __str__(self) -> str:
        name = PurePath(self.path).name or self.path
        return name if self.line is None else f"{name} line {self.line}"


class Row(dict):
    """One row: a dict that remembers its `source`."""

    def __init__(self, values: Mapping[str, Any] = (), *, source: RowSource | None = None) -> None:
        super().__init__(values)
        self.source = source


class Rows(Sequence):
    """Rows read from one source, in file order.

    Attributes:
        name: what was asked for, as given.
        bad: the errors of the rows that `max_bad` allowed to skip.
    """

    def __init__(self, rows: Iterable[Row], *, name: str = "", bad: Sequence[DatasetError] = ()) -> None:
        self._rows, self.name, self.bad = list(rows), name, tuple(bad)
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self._rows[index], name=self.name, bad=self.bad)
        return self._rows[index]

    def __repr__(self) -> str:
        return f"Rows({self.name!r}, {len(self):,} rows)"

    @property
    def digest(self) -> str:
        """sha256 of the rows' content in order, wherever the file lies; a row changed in place changes nothing."""
        if self._digest is None:
            self._digest = digest(self._rows)
        return self._digest


def digest(rows: Iterable[Any]) -> str:
    """sha256 over the canonical JSON of each row."""
    sha = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_plain)
        sha.update(text.encode() + b"\n")
    return sha.hexdigest()


def _plain(value: Any) -> Any:
    """What json cannot write: datums, arrays, tensors, dates."""
    if hasattr(value, "model_input"):
        return {"model_input": value.model_input.to_ints(), "loss_fn_inputs": dict(value.loss_fn_inputs)}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return str(value)


def fail(
    message: str, *, source: RowSource | None = None, field: str | None = None, kind: type[DatasetError] = DatasetError
) -> DatasetError:
    """A DatasetError that names the row; the caller raises it."""
    if source is None:
        return kind(message, field=field)
    return kind(message, path=source.path, line=source.line, field=field)


@contextmanager
def located(source: RowSource | None) -> Iterator[None]:
    """Give an error raised inside without a place the place of the row that caused it."""
    try:
        yield
    except DatasetError as error:
        if source is None or error.path is not None:
            raise
        raise fail(error.reason, source=source, field=error.field, kind=type(error)) from error
