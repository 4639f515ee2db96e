"""Bytes -> JSON rows, strictly: every refusal names the line and, where there is one, the field or the byte.

Lines end at \\n only: U+2028 and its like are ordinary characters inside strings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import DatasetError, EncodingError
from .rows import RowSource, fail

EXCERPT = 80
BOM = b"\xef\xbb\xbf"
JSON_NAMES = {
    str: "string", int: "number", float: "number", bool: "boolean", type(None): "null", list: "array", dict: "object"
}  # fmt: skip
OnRow = Callable[[dict | None, int, DatasetError | None], None]


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for name in names if names.count(name) > 1))
    return row


# strict=False lets raw control characters through, so that a NUL can be reported with the field that holds it.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, strict=False)


def decode(data: bytes, *, path: str, start: int = 0, line: int = 1) -> str:
    """UTF-8 or an EncodingError that gives the byte offset in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        raise EncodingError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at byte offset {start + error.start} ({error.reason}). "
            "Save the file as UTF-8, for example: iconv -f latin1 -t utf-8",
            path=path,
            line=line + before.count(b"\n"),
        ) from None


def check_encoding(data: bytes, *, path: str) -> bytes:
    """The bytes without a UTF-8 mark; UTF-16 and UTF-32 are refused, with or without theirs."""
    if data.startswith(BOM):
        return data[len(BOM) :]
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    if not wide and len(data) >= 4:
        head = data[: 64 - len(data[:64]) % 2]
        # Text in UTF-16 without a mark: every second byte of a Latin script is zero.
        wide = head[0::2].count(0) == len(head[0::2]) or head[1::2].count(0) == len(head[1::2])
    if wide and any(data[:64]):
        raise EncodingError(
            "looks like UTF-16 or UTF-32 from byte offset 0; save the file as UTF-8 "
            "(for example: iconv -f utf-16 -t utf-8)",
            path=path,
            line=1,
        )
    return data


def parse_lines(data: bytes, *, path: str, on_row: OnRow) -> int:
    """Hand each line's object or error to `on_row(row, line, error)`; returns the number of blank lines."""
    blank, offset = 0, 0
    lines = data.split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            blank += 1
        else:
            last_open = number == len(lines)
            try:
                row = _line(raw, path=path, line=number, offset=offset, unfinished=last_open)
            except DatasetError as error:
                on_row(None, number, error)
            else:
                on_row(row, number, None)
        offset += len(raw) + 1
    # The empty piece after a final newline is not a line.
    return blank - (1 if lines and not lines[-1].strip() else 0)


def _line(raw: bytes, *, path: str, line: int, offset: int, unfinished: bool) -> dict:
    source = RowSource(path, line)
    text = decode(raw, path=path, start=offset, line=line)
    try:
        value, end = _decode(text, len(text) - len(text.lstrip(" \t\r\n")))
    except json.JSONDecodeError as error:
        raise _invalid(error, text, source, unfinished) from None
    except (ValueError, RecursionError) as error:
        raise _refused(error, source) from None
    rest = text[end:].strip(" \t\r\n")
    if rest:
        raise fail(f"more than one JSON value on the line, at column {end + 1}: {excerpt(text, end)}", source=source)
    return check_row(value, text, source)


def _decode(text: str, start: int) -> tuple[Any, int]:
    return _DECODER.raw_decode(text, start)


def _invalid(error: json.JSONDecodeError, text: str, source: RowSource, unfinished: bool) -> DatasetError:
    if unfinished:
        return fail(
            f"truncated: the file ends inside this line, at column {len(text)}: {excerpt(text, len(text))}",
            source=source,
        )
    return fail(f"invalid JSON at column {error.pos + 1}: {error.msg}: {excerpt(text, error.pos)}", source=source)


def _refused(error: Exception, source: RowSource) -> DatasetError:
    if isinstance(error, _DuplicateKey):
        name = str(error)
        return fail(f"the key {name!r} appears twice in one object; keep one", source=source, field=name)
    if isinstance(error, RecursionError):
        return fail("JSON nested too deeply to read", source=source)
    return fail(f"unreadable JSON: {error}", source=source)


def check_row(value: Any, text: str, source: RowSource) -> dict:
    """An object whose strings are all valid text; `text` is the JSON it came from."""
    if not isinstance(value, dict):
        raise fail(f"expected object, got {JSON_NAMES[type(value)]}: {excerpt(text, 0)}", source=source)
    if "\\u" in text or "\x00" in text:
        check_strings(value, source=source)
    return value


def check_strings(value: Any, *, source: RowSource, field: str = "") -> None:
    """Refuse NUL characters and lone surrogates anywhere below `value`, naming the field."""
    if isinstance(value, str):
        for index, char in enumerate(value):
            if char == "\x00" or "\ud800" <= char <= "\udfff":
                what = "a NUL character" if char == "\x00" else f"a lone surrogate \\u{ord(char):04x}"
                raise fail(f"{what} at character {index}; remove it", source=source, field=field or None)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_strings(key, source=source, field=f"{field}.{_printable(key)}" if field else _printable(key))
            check_strings(item, source=source, field=f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_strings(item, source=source, field=f"{field}[{index}]")


def _printable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def parse_array(text: str, *, path: str) -> Iterator[tuple[dict | None, int, DatasetError | None]]:
    """Elements of one JSON array with the line each starts on; a broken element ends the reading."""
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        source = RowSource(path, line)
        if text[position : position + 1] == "]":
            break
        try:
            value, end = _decode(text, position)
        except json.JSONDecodeError as error:
            yield None, line, _broken_element(error, text, source)
            return
        except (ValueError, RecursionError) as error:
            yield None, line, _refused(error, source)
            return
        try:
            row = check_row(value, text[position:end], source)
        except DatasetError as error:
            yield None, line, error
        else:
            yield row, line, None
        position = _skip_space(text, end)
        mark = text[position : position + 1]
        if mark == ",":
            position += 1
        elif mark != "]":
            yield None, line, _after_element(text, position, path)
            return
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        place = RowSource(path, 1 + text.count("\n", 0, rest))
        yield None, place.line, fail(f"text after the end of the array: {excerpt(text, rest)}", source=place)


def _after_element(text: str, position: int, path: str) -> DatasetError:
    source = RowSource(path, 1 + text.count("\n", 0, position))
    if position >= len(text):
        return fail("truncated: the file ends before the array's closing ]", source=source)
    return fail(f"expected , or ] between array elements: {excerpt(text, position)}", source=source)


def _broken_element(error: json.JSONDecodeError, text: str, source: RowSource) -> DatasetError:
    # An error at the very end, or a string that never closes, is a file cut short.
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return fail(f"truncated: the file ends inside this element: {excerpt(text, len(text))}", source=source)
    place = RowSource(source.path, error.lineno)
    return fail(f"invalid JSON at column {error.colno}: {error.msg}: {excerpt(text, error.pos)}", source=place)


def parse_object(text: str) -> dict:
    """A file that is one object over several lines; only used to say what it is."""
    try:
        value, _ = _decode(text, _skip_space(text, 0))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def excerpt(text: str, position: int) -> str:
    """At most 80 characters around `position`, printable."""
    start = max(0, min(position - EXCERPT // 2, len(text) - EXCERPT))
    shown = repr(text[start : start + EXCERPT])[1:-1]
    return shown if len(shown) <= EXCERPT else shown[: EXCERPT - 3] + "..."
