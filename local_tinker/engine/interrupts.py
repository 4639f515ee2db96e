"""Sections that an interrupt must not cut in half."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@contextlib.contextmanager
def finish_first() -> Iterator[None]:
    """Hold the signals that may stop a run back until the block is done, then deliver them. Other threads never receive them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Handlers written in Python may raise in the middle of the block; the system's own end the process at once anyway.
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    held: list[tuple] = []
    for number in handlers:
        signal.signal(number, lambda *event: held.append(event))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in held:
            handlers[number](number, frame)
