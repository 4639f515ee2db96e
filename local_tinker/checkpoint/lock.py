"""One process at a time in a folder."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, StateError
from .disk import replace_file
from .names import ProcessMark
from .strict_json import dump_json, parse_json

_RETRY_S = 0.5  # a probe by `held` holds the lock for microseconds


class FolderLock:
    """Exclusive use of a folder until `release`, the end of the `with`, or the end of the process, however it ends.

    Keep the object: an unreferenced lock is released.

    The lock is the kernel's, on `.lock` in the folder; `.lock-holder` says who holds it and is never trusted for more
    than the error message.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: Any = None

    def acquire(self) -> FolderLock:
        """Raises StateError naming the holder when another process, or another lock in this one, has the folder."""
        if self._lock is not None:
            raise StateError(f"{self.folder} is already locked by this object: release it first")
        try:
            lock = self._try(timeout=_RETRY_S)
        except OSError as error:
            raise CheckpointError(f"cannot lock {self.folder}: {error.strerror}; use a folder you can write") from error
        if lock is None:
            raise StateError(
                f"{self.folder} is in use by {self._holder()}: wait until it ends, stop it, or use another folder"
            )
        self._lock = lock
        me = ProcessMark.current()
        holder = {"pid": me.pid, "start": me.start, "host": me.host, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(CheckpointError):  # a full disk costs the name in a message, not the lock
            replace_file(self.folder / ".lock-holder", dump_json(holder))
        return self

    def release(self) -> None:
        """Free the folder; does nothing when it is not held."""
        if self._lock is not None:
            with suppress(FileNotFoundError):
                os.unlink(self.folder / ".lock-holder")
            self._lock.release()
            self._lock = None

    def held(self) -> bool:
        """True while anybody, this process included, holds the folder."""
        if self._lock is not None:
            return True
        if not (self.folder / ".lock").exists():
            return False
        try:
            lock = self._try(timeout=0)
        except OSError:
            return True  # not ours to open, so not ours to take
        if lock is None:
            return True
        lock.release()
        return False

    def __enter__(self) -> FolderLock:
        return self if self._lock is not None else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self, *, timeout: float) -> Any:
        # Imported late: it costs more than the rest of this package together.
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock", timeout=timeout, thread_local=False)
        try:
            lock.acquire(poll_interval=0.02)
        except Timeout:
            return None
        return lock

    def _holder(self) -> str:
        try:
            found = parse_json((self.folder / ".lock-holder").read_bytes())
            mark = ProcessMark(int(found["pid"]), int(found["start"]), str(found["host"]))
            since = str(found["since"])
        except (OSError, ValueError, TypeError, KeyError):
            return "another process"
        if mark.gone:
            return "another process"
        return f"process {mark.pid}{'' if mark.here else ' on another host'} since {since}"
