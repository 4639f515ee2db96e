"""Whose turn it is on the device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """One at a time, in order of asking: a long sampling run that takes many turns lets others in between.

    Garbage collection may run in any thread at any point, also in one that holds some other lock, so what it wants done
    is only noted by `later` and done at the start of the next turn.
    """

    def __init__(self) -> None:
        self._device, self._next = threading.Lock(), threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()

    def later(self, action: Callable[[], None]) -> None:
        """Do this at the start of the next turn. Takes no lock."""
        self._waiting.append(action)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        # Who waits for the device holds `next`, so whoever had the device comes after.
        with self._next:
            self._device.acquire()
        try:
            while self._waiting:
                self._waiting.popleft()()
            yield
        finally:
            self._device.release()
