"""Ctrl-C, SIGTERM and a closed terminal in a training loop: finish the step, save, leave; a second one stops at once and saves too."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..engine.interrupts import SIGNALS


class Signals:
    """Handlers for SIGINT, SIGTERM and SIGHUP between `install` and `restore`; other threads than the main one get none.

    Attributes:
        asked: a stop was asked for. cause: by which signal.
    """

    def __init__(self) -> None:
        self.asked, self.cause = False, "Ctrl-C"
        self._saving = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            # nohup sets SIGHUP to be ignored, and means it
            for number in (each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._received)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A stretch that no signal cuts short."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _received(self, number: int, _frame: Any) -> None:
        if self._saving:
            _write("saving, one moment")
        elif not self.asked:
            self.asked, self.cause = True, "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            _write("stopping after this step; once more to stop now")
        else:
            raise KeyboardInterrupt


def _write(line: str) -> None:
    # print() from a signal handler can meet a print() that it interrupted
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{line}\n".encode())
