"""Who runs next: continuous batching over a pool of pages, first come first served. Host bookkeeping only, no torch.

Pages are taken as rows grow. When none is left the youngest rows give theirs back and wait; later they are computed
again from their tokens, and draw on as if nothing had happened, since a draw depends on seed and position alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UsageError
from .group import PAGE, Group, Sequence, pages_for


class PagePool:
    """Counts the cache's pages 1..`pages`: which are taken, which are free. Low numbers first, so that storage grows
    with use. Page 0 is where rows that have ended write."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.touched = 1  # pages ever handed out, page 0 included: what storage must hold
        self._free = list(range(pages, 0, -1))

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
    """Tokens start..stop-1 of the context of a group or of a row, to compute in the next forward."""

    owner: Group | Sequence
    start: int
    stop: int


class Scheduler:
    """Which rows decode, in which slots, and which tokens are computed first.

    Args:
        max_rows: samples that decode at a time. prefill_chunk: prompt tokens a forward. seen_most: tokens that the pieces
            of a forward may see in all, themselves included, since their keys and values are gathered for it; a piece
            that sees more goes alone.
        admit_at: free slots to wait for before new rows come in, while others decode: computing one prompt costs nearly
            as much as computing several.
        budget: tokens the cache may hold at most, to name in errors.
        alone: compute each context in forwards of its own, and take a row's pages at once so that it is never evicted:
            for results that do not depend on what else runs.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        pool: PagePool,
        max_rows: int,
        prefill_chunk: int,
        seen_most: int,
        budget: int | None = None,
        admit_at: int = 1,
        alone: bool = False,
    ) -> None:
        self._pool = pool
        self._budget = pool.pages * PAGE if budget is None else budget // PAGE * PAGE
        self._prefill_chunk, self._seen_most = prefill_chunk, seen_most
        self._admit_at, self._alone = admit_at, alone
        self._queue = deque(groups)
        self._pending: deque[Group | Sequence] = deque()  # contexts that are not computed yet
        self._stored: list[Group] = []  # those with pages
        self._running: list[Sequence] = []  # admitted, oldest first
        self.slots: list[Sequence | None] = [None] * max_rows
        self._check_fit()

    @property
    def pool(self) -> PagePool:
        return self._pool

    @property
    def unfinished(self) -> bool:
        return bool(self._queue or self._running)

    @property
    def waiting(self) -> bool:
        """Whether rows wait to be admitted."""
        return bool(self._queue)

    @property
    def computing(self) -> bool:
        """Whether contexts of admitted rows are left to compute."""
        return bool(self._pending)

    @property
    def rows(self) -> list[Sequence]:
        """Admitted rows, oldest first."""
        return list(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        return [row for row in self._running if row.slot is not None]

    def plan(self) -> list[Piece]:
        """Admit what fits, then cut the next context tokens, at most `prefill_chunk` of them that see at most `seen_most`."""
        self._admit()
        pieces: list[Piece] = []
        left, unseen = self._prefill_chunk, self._seen_most
        while self._pending and left and not (self._alone and pieces):
            owner = self._pending[0]
            context = len(owner.context)
            stop = min(context, owner.computed + left)
            if pieces and stop < context and context - owner.computed <= self._prefill_chunk:
                break  # whole in the next forward: a piece that continues another is slower
            unseen -= owner.offset + stop
            if pieces and unseen < 0:
                break
            pieces.append(Piece(owner, owner.computed, stop))
            left -= stop - owner.computed
            owner.computed = stop
            if stop == context:
                self._pending.popleft()
        return pieces

    def entering(self) -> list[Sequence]:
        """Rows whose context is computed and that do not decode yet; they get their slots here."""
        ready = [row for row in self._running if row.slot is None and row.last_hidden is not None]
        free = (slot for slot, row in enumerate(self.slots) if row is None)
        for row in ready:
            row.slot = next(free)
            self.slots[row.slot] = row
        return ready

    def reserve(self, steps: int) -> bool:
        """Pages for the next steps of every decoding row; False where the pool cannot give them."""
        wanted = {row: row.pages_after(steps) - len(row.pages) for row in self.decoding}
        if sum(wanted.values()) > self._pool.free:
            self._drop_idle(keep=[])
        if sum(wanted.values()) > self._pool.free:
            return False
        for row, count in wanted.items():
            row.pages += self._pool.take(count)
            row.advance(steps)
        return True

    def evict(self) -> int | None:
        """The youngest row gives its pages back and waits at the head of the queue; returns the slot it had. Its tokens
        must all be known."""
        assert len(self._running) > 1, "the oldest row always fits"
        return self._put_back()

    def _put_back(self) -> int | None:
        row = self._running.pop()
        slot = row.slot
        self._vacate(row)
        row.restart()
        if row in self._pending:
            self._pending.remove(row)
        group = row.group
        group.running -= 1
        self._forget_idle(group)
        group.waiting.appendleft(row)
        if not self._queue or self._queue[0] is not group:
            if group in self._queue:
                self._queue.remove(group)
            self._queue.appendleft(group)
        return slot

    @property
    def least_pages(self) -> int:
        """Pages without which some row could not run even alone."""
        groups = {id(group): group for group in (*self._queue, *(row.group for row in self._running))}.values()
        rows = [*self._running, *(row for group in groups for row in group.waiting)]
        return max((_alone(row) for row in rows), default=1)

    def start_over(self, *, pages: int, max_rows: int, prefill_chunk: int) -> None:
        """Nothing is stored any more, and less may be: every row waits again, in its order and with the tokens it has."""
        while self._running:
            self._put_back()
        self._drop_idle(keep=[])
        self._pool = PagePool(pages)
        self._seen_most = self._seen_most * prefill_chunk // self._prefill_chunk
        self._prefill_chunk = prefill_chunk
        self.slots = [None] * max_rows
        self._admit_at = min(self._admit_at, max_rows)

    def release(self, finished: Iterable[Sequence]) -> None:
        """Give back what finished samples hold, and the prompt with the last of its group."""
        gone = set(finished)
        if not gone:
            return
        self._running = [row for row in self._running if row not in gone]
        for row in gone:
            self._vacate(row)
            row.group.running -= 1
            self._ended(row.group)

    def compact(self, rows: int) -> list[tuple[int, int]]:
        """Move rows to slots below `rows`; returns (from, to)."""
        moves = []
        free = (slot for slot in range(rows) if self.slots[slot] is None)
        for slot in range(rows, len(self.slots)):
            row = self.slots[slot]
            if row is not None:
                row.slot = next(free)
                self.slots[row.slot], self.slots[slot] = row, None
                moves.append((slot, row.slot))
        return moves

    def _vacate(self, row: Sequence) -> None:
        self._pool.give(row.pages)
        row.pages, row.last_hidden = [], None
        if row.slot is not None:
            self.slots[row.slot] = None
            row.slot = None

    def _ended(self, group: Group) -> None:
        """One sample less to come of a group, or one group less on a base."""
        group.unfinished -= 1
        if group.unfinished:
            return
        self._forget(group)
        if group.base is not None:
            self._ended(group.base)

    def _forget(self, group: Group) -> None:
        if not group.pages:
            return
        self._pool.give(group.pages)
        group.pages, group.computed, group.last_hidden = [], 0, None
        self._stored.remove(group)
        if group in self._pending:
            self._pending.remove(group)
        if group.base is not None:
            group.base.running -= 1

    def _forget_idle(self, group: Group | None) -> None:
        """Pages of a group that nothing running reads, and of the bases below that only it had in use."""
        while group is not None and not group.running:
            self._forget(group)
            group = group.base

    def _drop_idle(self, keep: list[Group]) -> None:
        """Let go of what is only kept for samples that come later; they compute it again."""
        for group in reversed(self._stored.copy()):  # what stands on a base before the base
            if not group.running and group not in keep:
                self._forget(group)

    def _store(self, group: Group) -> None:
        group.pages = self._pool.take(pages_for(len(group.context)))
        self._stored.append(group)
        self._pending.append(group)
        if group.base is not None:
            group.base.running += 1

    def _admit(self) -> None:
        free = len(self.slots) - len(self._running)
        if self._running and free < min(self._admit_at, sum(len(group.waiting) for group in self._queue)):
            return
        while self._queue and len(self._running) < len(self.slots):
            group = self._queue[0]
            row = group.waiting[0]
            missing = [part for part in group.chain if not part.pages]
            own = row.pages_after(row.most if self._alone else 1)
            # One page more for every row that runs: a row admitted only to be evicted at once computes for nothing.
            spare = 0 if self._alone else len(self._running)
            wanted = sum(pages_for(len(part.context)) for part in missing) + own + spare
            if wanted > self._pool.free:
                self._drop_idle(keep=group.chain)
            if wanted > self._pool.free:
                return
            for part in missing:
                self._store(part)
            row.pages = self._pool.take(own)
            if row.context:
                self._pending.append(row)
            group.waiting.popleft()
            group.running += 1
            self._running.append(row)
            if not group.waiting:
                self._queue.popleft()

    def _check_fit(self) -> None:
        for group in self._queue:
            for row in group.waiting:
                if _alone(row) > self._pool.pages:
                    raise UsageError(
                        f"prompt {row.request} needs cache for {len(row.prompt_tokens)} prompt tokens and {row.max_new} "
                        f"new ones, the sampler's budget is {self._budget} tokens; "
                        "lower max_tokens or shorten the prompt"
                    )


def _alone(row: Sequence) -> int:
    """The most pages a row comes to, its group's included."""
    return sum(pages_for(len(part.context)) for part in row.group.chain) + pages_for(row.most)
