"""A path, glob, folder or hub id -> rows; errors name file, line and field.

json, jsonl and csv are read with the standard library; parquet needs pyarrow and hub ids need datasets, imported here
only when asked for.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import whole
from ..errors import DatasetError, MissingDependencyError, UsageError
from ..keywords import known_keywords
from . import hub, jsonfile
from .rows import Row, Rows, RowSource, fail

Say = Callable[[str], None]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_SPLIT = re.compile(r"^(?P<name>[\w.-]*)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?$")
_MAGIC = {
    b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd data", b"BZh": "bzip2 data", b"\xfd7zXZ": "xz data",
    b"PAR1": "Parquet", b"\x7fELF": "a program",
}  # fmt: skip


@dataclass
class _Collector:
    """Rows and errors as they are met: the first error beyond `max_bad` ends the reading."""

    max_bad: int
    limit: int | None
    rows: list[Row]
    bad: list[DatasetError]

    @property
    def full(self) -> bool:
        return self.limit is not None and len(self.rows) >= self.limit

    def add(self, path: str, row: dict | None, line: int, error: DatasetError | None) -> None:
        if self.full:
            return
        if error is None:
            self.rows.append(Row(row, source=RowSource(path, line)))
            return
        self.bad.append(error)
        if len(self.bad) > self.max_bad:
            if self.max_bad:
                raise type(error)(
                    f"{error.reason} ({len(self.bad)} bad rows, max_bad={self.max_bad})",
                    path=error.path, line=error.line, field=error.field,
                )  # fmt: skip
            raise error


@known_keywords
def load_rows(
    source: str | os.PathLike,
    *,
    split: str | None = None,
    limit: int | None = None,
    max_bad: int = 0,
    say: Say | None = None,
) -> Rows:
    """Read rows.

    Args:
        source: a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, each also .gz), a glob, a folder, or a hub id
            (``org/name``, ``org/name:config``, ``hub:org/name#train[:1000]``).
        split: ``train``, or ``train[:1000]``; in a folder it picks the files named after it. Default: train.
        limit: at most so many rows; None or -1 for all.
        max_bad: rows that may be unreadable; they are skipped, said, and kept in `Rows.bad`.
        say: takes one line a notice.

    Raises:
        DatasetError: what cannot be read, with file, line and field. EncodingError: bytes that are not UTF-8.
        MissingDependencyError: pyarrow or datasets is needed.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError(
            f"load_rows reads a file, glob, folder or hub id, given as a str or path; got {type(source).__name__}. Rows that "
            "are in memory already go to batches(...) as they are"
        )
    name, tell = os.fspath(source), say or (lambda message: None)
    limit = _check_count("limit", None if limit == -1 else limit)
    if limit == 0:
        raise UsageError("limit=0 keeps no row; give a number of rows, or -1 for all")
    _check_count("max_bad", max_bad)
    where, split = _split_source(name, split)
    # A slice is taken first and the limit after it, so files are then read whole.
    out = _Collector(max_bad=max_bad, limit=None if "[" in (split or "") else limit, rows=[], bad=[])
    files = None if where.startswith("hub:") else _files(where, split, tell)
    if files is None:
        _read_hub(where.removeprefix("hub:"), split, out, tell)
    else:
        blank = 0
        for path in files:
            if not out.full:
                blank += _read_file(path, out, tell)
        out.rows = _slice(out.rows, split)
        if not out.rows and not out.bad:
            note = f" ({blank} blank lines)" if blank else " (the file is empty)" if len(files) == 1 else ""
            raise DatasetError(f"no examples{note}", path=name)
    if not out.rows:
        raise DatasetError(f"no examples: {len(out.bad)} bad rows were skipped", path=name)
    for error in out.bad:
        tell(f"skipped a bad row: {error}")
    return Rows(out.rows[:limit], name=name, bad=out.bad)


def _check_count(name: str, value: int | None) -> int | None:
    if value is not None:
        whole(name, value, least=0)
    return value


def _split_source(name: str, split: str | None) -> tuple[str, str | None]:
    """`id#train[:10]` -> (`id`, `train[:10]`); a `#` in a file name that exists is part of the name."""
    if not name:
        raise UsageError("the dataset is an empty string; give a file, a glob, a folder or a hub id")
    if "#" not in name or os.path.exists(name):
        return name, split
    where, _, asked = name.rpartition("#")
    if split is not None and asked != split:
        raise UsageError(f"{name!r} asks for split {asked!r} and split={split!r}; give one of them")
    return where, asked


def _slice(rows: list[Row], split: str | None) -> list[Row]:
    match = _SPLIT.match(split or "")
    if match is None:
        raise UsageError(f"split must look like train or train[:1000], got {split!r}")
    start, stop = match["start"], match["stop"]
    return rows[int(start) if start else None : int(stop) if stop else None]


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _files(where: str, split: str | None, say: Say) -> list[Path] | None:
    """The files meant, sorted; None when the name can only be a hub id."""
    path = Path(where).expanduser()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot be opened: {getattr(error, 'strerror', None) or error}", path=where) from None
    if mode is not None and not stat.S_ISDIR(mode):
        if _SPLIT.match(split or "") is None or _SPLIT.match(split or "")["name"]:
            raise UsageError(f"{where} is one file and has no splits; got split {split!r}")
        return [path]
    if mode is not None:
        found = [entry for entry in sorted(path.iterdir()) if _suffix(entry) and not entry.name.startswith(".")]
        if not found:
            raise DatasetError(f"the folder holds no data files; looked for {', '.join(SUFFIXES)}", path=where)
        return _of_split(found, where, split, say)
    if any(char in where for char in "*?["):
        base = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(base.glob(str(path.relative_to(base) if path.is_absolute() else path)))
        found = [entry for entry in found if not entry.is_dir()]
        if not found:
            raise DatasetError("no file matches this pattern", path=where)
        return found if split is None else _of_split(found, where, split, say)
    if not _suffix(path) and hub.HUB_ID.match(where):
        return None
    raise DatasetError(f"no such file.{_neighbours(path)}", path=where)


def _neighbours(path: Path) -> str:
    here = "This folder" if path.parent == Path() else f"{path.parent}"
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    close = _near(path)
    names = _data_names(path.parent)
    return f" Did you mean {close}?" if close else f" {here} holds: {', '.join(names[:5])}" if names else ""


def _near(path: Path) -> str:
    """The data file beside `path` whose name is most like its; or nothing."""
    close = difflib.get_close_matches(path.name, _data_names(path.parent), n=1, cutoff=0.7)
    return str(path.parent / close[0]) if close else ""


def _data_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if _suffix(entry))
    except OSError:
        return []


def _of_split(files: list[Path], where: str, split: str | None, say: Say) -> list[Path]:
    """The files of one split. A folder of named splits is never read whole: test rows would be trained on."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.name.lower())
        by_split.setdefault(next((word for word in words if word in SPLIT_NAMES), ""), []).append(file)
    named = sorted(set(by_split) - {""})
    match = _SPLIT.match(split or "")
    wanted = match["name"] if match else split
    if wanted:
        if wanted not in by_split:
            raise DatasetError(
                f"no split {wanted!r}; here: {', '.join(named) or 'files without split names'}", path=where
            )
        return by_split[wanted]
    if not named:
        return files
    if "train" not in by_split:
        raise DatasetError(f"holds the splits {', '.join(named)}; choose one with split=", path=where)
    if len(by_split) > 1:
        others = sorted(file.name for key in by_split if key != "train" for file in by_split[key])
        say(f"{where}: reading split train; not read: {', '.join(others)}")
    return by_split["train"]


def _read_bytes(path: Path) -> bytes:
    """The whole of a regular file, decompressed; a file that changes meanwhile is refused."""
    try:
        # O_NONBLOCK: opening a FIFO nobody writes to would wait for ever.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot be opened: {getattr(error, 'strerror', None) or error}", path=path) from None
    with open(handle, "rb") as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise DatasetError("not a regular file (a pipe, device or folder); give a file", path=path)
        data = file.read(before.st_size + 1)
        after = os.fstat(file.fileno())
    if len(data) != before.st_size or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise DatasetError("the file changed while it was read; wait until it is complete and try again", path=path)
    if data[:2] == b"\x1f\x8b":
        return _gunzip(data, path)
    if path.name.endswith(".gz") and data:
        raise DatasetError("named .gz but is not gzip data; rename it or compress it again", path=path)
    return data


def _gunzip(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError:
        raise DatasetError("truncated gzip: the compressed data ends early; copy the file again", path=path) from None
    except (OSError, zlib.error) as error:
        raise DatasetError(f"damaged gzip: {error}; copy the file again", path=path) from None


def _read_file(path: Path, out: _Collector, say: Say) -> int:
    """Add the rows of one file; returns its number of blank lines."""
    suffix = _suffix(path)
    if not suffix:
        raise DatasetError(f"unknown kind of file; readable: {', '.join(SUFFIXES)}, each also .gz", path=path)
    data = _read_bytes(path)
    if suffix == ".parquet":
        _read_parquet(data, path, out)
        return 0
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            raise DatasetError(f"named {suffix} but holds {what}; rename or unpack it", path=path)
    data = jsonfile.check_encoding(data, path=str(path))
    if suffix in (".csv", ".tsv"):
        _read_csv(data, path, "\t" if suffix == ".tsv" else ",", out)
        return 0
    return _read_json(data, path, suffix, out, say)


def _read_json(data: bytes, path: Path, suffix: str, out: _Collector, say: Say) -> int:
    name = str(path)
    if data.lstrip(b" \t\r\n")[:1] == b"[":
        _read_array(data, path, suffix, out, say)
        return 0
    if suffix == ".json":
        first = data.lstrip(b" \t\r\n").split(b"\n", 1)[0]
        if first.rstrip() in (b"{", b"") or not first.rstrip().endswith(b"}"):
            keys = list(jsonfile.parse_object(jsonfile.decode(data, path=name)))
            if keys:
                raise DatasetError(
                    f"one JSON object with the keys {', '.join(keys[:8])}, not rows; give an array of objects, or one "
                    "object a line (.jsonl)",
                    path=name, line=1,
                )  # fmt: skip
        elif data.strip():
            say(f"{name}: one JSON object a line, read as JSON lines")
    return jsonfile.parse_lines(data, path=name, on_row=lambda row, line, error: out.add(name, row, line, error))


def _read_array(data: bytes, path: Path, suffix: str, out: _Collector, say: Say) -> None:
    name, before = str(path), len(out.rows)
    for row, line, error in jsonfile.parse_array(jsonfile.decode(data, path=name), path=name):
        out.add(name, row, line, error)
    if suffix != ".json":
        say(f"{name}: looks like JSON, not JSON lines: read as an array of {len(out.rows) - before:,} rows")


def _read_csv(data: bytes, path: Path, delimiter: str, out: _Collector) -> None:
    name = str(path)
    text = jsonfile.decode(data, path=name)
    # The csv module keeps one process-wide limit (128 KiB a field); long examples are fine here.
    old = csv.field_size_limit(max(len(text), 131072))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for line, record, error in _records(reader, name):
            if error is None and line == 0:
                header = _check_header(record, name)
                continue
            row = None
            if error is None and len(record) != len(header):
                message = f"{len(record)} values for {len(header)} columns ({', '.join(header)})"
                error = fail(message, source=RowSource(name, line))
            if error is None:
                row = dict(zip(header, record, strict=True))
                try:
                    jsonfile.check_strings(row, source=RowSource(name, line))
                except DatasetError as refused:
                    error = refused
            out.add(name, row, line, error)
    finally:
        csv.field_size_limit(old)


def _records(reader: Any, name: str) -> Iterator[tuple[int, list[str], DatasetError | None]]:
    """(line a record starts on, values, error); the header comes first, as line 0."""
    header_seen, line = False, 1
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, [], fail(f"invalid CSV: {error}", source=RowSource(name, line))
            return
        if record:
            yield (line if header_seen else 0), record, None
            header_seen = True


def _check_header(names: list[str], path: str) -> list[str]:
    names = [column.strip() for column in names]
    if any(not column for column in names):
        raise DatasetError(f"a column without a name in the header: {', '.join(names)}", path=path, line=1)
    twice = next((column for column in names if names.count(column) > 1), None)
    if twice:
        raise DatasetError("two columns of the same name", path=path, line=1, field=twice)
    return names


def _read_parquet(data: bytes, path: Path, out: _Collector) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from None
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"unreadable Parquet: {error}", path=path) from None
    for number, row in enumerate(rows, start=1):
        out.add(str(path), strip_holes(row), number, None)


def strip_holes(value: Any) -> Any:
    """Without the None that columnar files put where a record has no such key, at every depth."""
    if isinstance(value, dict):
        return {key: strip_holes(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        records = any(isinstance(item, dict) for item in value)
        return [strip_holes(item) for item in value if not (records and item is None)]
    return value


def _read_hub(where: str, split: str | None, out: _Collector, say: Say) -> None:
    """Add the rows of a hub data set."""
    hub_id = where.partition(":")[0]
    if not split or split.startswith("["):
        split = f"train{split or ''}"
        say(f"{hub_id}: reading split {split}")
    for number, row in enumerate(hub.table(where, split, near=_near(Path(where))), start=1):
        if out.full:
            break
        out.add(f"{hub_id}#{split}", strip_holes(dict(row)), number, None)
