"""The exception tree. Every message says what came, what is allowed, and what to do.

`exit_code` is what the command line ends with: 1 a failed run, 2 usage, 3 environment, 4 out of memory.
"""

from __future__ import annotations

from pathlib import Path


class LocalTinkerError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class UsageError(LocalTinkerError, ValueError):
    """An argument, option or config key that cannot be meant as given."""

    exit_code = 2


class DatasetError(LocalTinkerError, ValueError):
    """A row that cannot be trained on.

    Args:
        message: what is wrong and what to do.
        path: the file the row came from, when it came from one.
        line: 1-based line (or row) number.
        field: the field at fault, e.g. ``messages[2].content``.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, path: str | Path | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        self.reason, self.path, self.line, self.field = message, path, line, field
        place = str(path) if path is not None else ""
        if line is not None:
            place += f"{', ' if place else ''}line {line}"
        if field:
            place += f"{', ' if place else ''}field {field!r}"
        super().__init__(f"{place}: {message}" if place else message)

    def __reduce__(self):
        return _rebuild_dataset_error, (type(self), self.reason, self.path, self.line, self.field)


def _rebuild_dataset_error(kind, reason, path, line, field):
    return kind(reason, path=path, line=line, field=field)


class EncodingError(DatasetError):
    """Bytes that are not UTF-8; the message gives the byte offset."""


class ModelError(LocalTinkerError):
    """A model that cannot be found, loaded or used as asked."""

    exit_code = 3


class MissingDependencyError(LocalTinkerError, ImportError):
    """An optional package is needed; the message holds the install line."""

    exit_code = 3


class CheckpointError(LocalTinkerError):
    """A checkpoint that cannot be written, read or used with this model."""


class CorruptCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or does not match its manifest."""


class StateError(LocalTinkerError, RuntimeError):
    """A call that the client's present state does not allow."""


class DeviceMemoryError(LocalTinkerError):
    """Nothing smaller is left to try; state is as it was before the call."""

    exit_code = 4
