"""A run that goes on with less when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..out_of_memory import until_it_fits
from .group import PAGE, Group
from .run import Run
from .scheduler import Scheduler
from .workspace import Workspace

if TYPE_CHECKING:
    from .decode import SamplerEngine

ADVICE = "Close other programs on the device, or use a smaller max_tokens, shorter prompts, quantize='4bit' or a smaller model"


@dataclass(frozen=True)
class Size:
    """What a run's memory goes with: rows decoded together, pages of the cache, context tokens a forward."""

    rows: int
    pages: int
    chunk: int

    def smaller(self, *, least_rows: int, least_pages: int) -> Size | None:
        """Half of everything that can be halved; None where nothing can."""
        half = Size(
            max(self.rows // 2, min(self.rows, least_rows)),
            max(self.pages // 2, min(self.pages, least_pages)),
            max(self.chunk // 2, min(self.chunk, PAGE)),
        )
        return None if half == self else half


class Running:
    """One run, which goes on with less when memory runs out: all that was stored is let go and computed again from the
    tokens, and draws depend on seed and position alone."""

    def __init__(
        self,
        engine: SamplerEngine,
        scheduler: Scheduler,
        groups: Sequence[Group],
        adapter: tuple[Mapping, float],
        *,
        fixed: bool,
        stream: bool,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._scheduler, self._groups = engine, scheduler, groups
        self._adapter, self._fixed, self._stream, self._say = adapter, fixed, stream, say
        self._work: Workspace | None = None
        self._run: Run | None = None
        self._round: Iterator[Any] | None = None
        self._size = Size(len(scheduler.slots), scheduler.pool.pages, engine.prefill_chunk)

    def next(self) -> list[tuple[Any, list[int], list[float]]] | None:
        """What was drawn next; None at the end of a round."""
        return until_it_fits(self._attempt, step_down=self._step_down, advice=ADVICE)

    def _attempt(self) -> list[tuple[Any, list[int], list[float]]] | None:
        try:
            if self._run is None:
                self._work = self._engine.take(self._scheduler.pool.pages)
                self._run = Run(
                    self._engine.forward,
                    self._work,
                    self._scheduler,
                    self._groups,
                    fixed=self._fixed,
                    stream=self._stream,
                )
                self._engine.forward.bind(*self._adapter, anew=True)
            if self._round is None:
                self._engine.forward.bind(*self._adapter)  # another run may have had its turn
                self._run.round()
                self._round = self._run.settle()
            drawn = next(self._round, None)
        except BaseException:
            self.end(False)
            raise
        if drawn is None:
            self._round = None
        return drawn

    def _step_down(self) -> bool:
        scheduler = self._scheduler
        if self._engine.spare():
            size = self._size
        else:
            touched = min(self._size.pages, max(scheduler.pool.touched, scheduler.least_pages))
            used = replace(self._size, pages=touched)
            size = used.smaller(least_rows=self._size.rows if self._fixed else 1, least_pages=scheduler.least_pages)
            if size is None:
                return False
            self._say(
                f"out of memory while sampling; the work is repeated, {size.rows} at a time with a cache of "
                f"{size.pages * PAGE:,} tokens"
            )
        self._size = size
        scheduler.start_over(pages=size.pages, max_rows=size.rows, prefill_chunk=size.chunk)
        return True

    def release(self, finished: Sequence[Any]) -> None:
        """Rows whose end the host has seen."""
        self._run.release(finished)

    def end(self, whole: bool) -> None:
        """Give the workspace back, or what an error or an interrupt has left half done to the device."""
        work, self._work, self._run, self._round = self._work, None, None, None
        if work is not None:
            self._engine.give_back(work) if whole else work.free()
