"""Who runs next: continuous batching under a page budget, first come first served. Host bookkeeping only, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UsageError
from .sequence import Group, Sequence

PAGE = 16  # tokens; half a page is lost per stored segment on average


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


class PagePool:
    """Counts the cache's pages: which are taken, which are free. Low numbers first, so that storage grows with use."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.touched = 0  # pages ever handed out: what storage must hold
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), f"take({count}) of {len(self._free)} free pages"
        taken = [self._free.pop() for _ in range(count)]
        self.touched = max([self.touched, *(page + 1 for page in taken)])
        return taken

    def give(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))
        assert len(self._free) <= self.pages, "a page was given back twice"


@dataclass(frozen=True)
class Piece:
    """Prompt tokens start..stop-1 of a group, to compute in the next forward."""

    group: Group
    start: int
    stop: int


class Scheduler:
    """Admits samples in order while rows and pages last; pages for all a sample may come to are taken at its admission,
    so an admitted sample always finishes. The prompt of a group is kept while one of its samples is unfinished.

    Args:
        max_rows: samples admitted at a time. prefill_chunk: prompt tokens a forward.
    """

    def __init__(self, groups: Iterable[Group], *, pool: PagePool, max_rows: int, prefill_chunk: int) -> None:
        self._pool = pool
        self._max_rows, self._prefill_chunk = max_rows, prefill_chunk
        self._queue = deque(groups)
        self._prefilling: deque[Group] = deque()
        self.rows: list[Sequence] = []
        self._check_fit()

    @property
    def unfinished(self) -> bool:
        return bool(self._queue or self.rows)

    def plan(self) -> list[Piece]:
        """Admit what fits, then cut the next prompt tokens, at most `prefill_chunk` of them."""
        self._admit()
        pieces: list[Piece] = []
        left = self._prefill_chunk
        while self._prefilling and left:
            group = self._prefilling[0]
            stop = min(len(group.prompt_tokens), group.computed + left)
            pieces.append(Piece(group, group.computed, stop))
            left -= stop - group.computed
            group.computed = stop
            if stop == len(group.prompt_tokens):
                self._prefilling.popleft()
        return pieces

    def release(self, finished: Iterable[Sequence]) -> None:
        """Give back what finished samples hold, and the prompt with the last of its group."""
        gone = set(finished)
        if not gone:
            return
        self.rows = [row for row in self.rows if row not in gone]
        for sequence in gone:
            group = sequence.group
            self._pool.give(sequence.pages)
            sequence.pages = []
            group.unfinished -= 1
            if not group.unfinished:
                self._pool.give(group.pages)
                group.pages, group.last_hidden = [], None

    def _admit(self) -> None:
        while self._queue and len(self.rows) < self._max_rows:
            group = self._queue[0]
            sequence = group.waiting[0]
            own = _row_pages(sequence)
            prompt = 0 if group.pages else pages_for(len(group.prompt_tokens))
            if prompt + own > self._pool.free:
                return
            if prompt:
                group.pages = self._pool.take(prompt)
                self._prefilling.append(group)
            sequence.pages = self._pool.take(own)
            self.rows.append(group.waiting.popleft())
            if not group.waiting:
                self._queue.popleft()

    def _check_fit(self) -> None:
        for group in self._queue:
            prompt = len(group.prompt_tokens)
            for sequence in group.waiting:
                if pages_for(prompt) + _row_pages(sequence) > self._pool.pages:
                    raise UsageError(
                        f"prompt {sequence.request} needs cache for {prompt} prompt tokens and {sequence.max_new} "
                        f"new ones, the sampler's budget is {self._pool.pages * PAGE} tokens; "
                        "lower max_tokens or shorten the prompt"
                    )


def _row_pages(sequence: Sequence) -> int:
    return pages_for(sequence.max_new - 1)  # the last token is never fed back, so nothing of it is stored
