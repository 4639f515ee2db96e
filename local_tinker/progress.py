"""A progress line on stderr for sampling that takes long; nothing where nobody watches."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

QUIET_SECONDS = 2.0  # shorter work shows nothing


@contextlib.contextmanager
def sampling_progress(total: int) -> Iterator[Callable[[Any], None] | None]:
    """Yields what `Engine.sample` reports to, or None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    started, bar = time.monotonic(), None

    def update(progress: Any) -> None:
        nonlocal bar
        seconds = time.monotonic() - started
        if bar is None:
            if seconds < QUIET_SECONDS:
                return
            bar = _Bar(total)
        bar.update(progress.finished, progress.tokens / seconds)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


class _Bar:
    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("sampling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} tok/s"),
        ]
        self._progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("sampling", total=total, rate=0.0)
        self._progress.start()

    def update(self, finished: int, rate: float) -> None:
        self._progress.update(self._task, completed=finished, rate=rate)

    def close(self) -> None:
        self._progress.stop()
