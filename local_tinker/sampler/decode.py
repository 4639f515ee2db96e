"""The sampling loop: contexts are computed, rows draw and advance on the device, the host reads a block of steps later.

Shapes: N packed tokens, B decoding rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError, UsageError
from ..model.decode import DecodeRoad
from ..model.kernels import power_of_two
from ..model.kernels.draw import Output, RowState, advance
from .forward import Forward, Head, Road
from .rows import TableShape, count_segments, entering_state, most_readers, new_output, table_shape
from .scheduler import PagePool, Piece, Scheduler
from .sequence import PAGE, Delta, Finished, Group, Request, build_groups, check_ids, pages_for
from .sequence import Sequence as Row
from .workspace import BUCKETS, STEPS, Fetch, StepKind, Workspace, pick

HEAD_ROWS = 256  # rows of full logits at a time when a prompt is scored
FIXED_ROWS = 64  # rows of every step where results must not depend on the batch


@dataclass(frozen=True)
class Progress:
    """How far a run has come: samples finished of all, tokens sampled so far."""

    finished: int
    total: int
    tokens: int


@dataclass(frozen=True)
class _Drawn:
    """Rows with their columns in what a block of steps draws."""

    rows: list[tuple[Row, int]]
    fetch: Fetch


class _Run:
    """One run's work on the device.

    Gradients are off by no_grad, not inference_mode: tables a road makes and keeps on first use (rope, dequantised
    weights) would be inference tensors, which a later training step may not save for its backward. The mode wraps
    single rounds, never a yield, where it would leak into the caller's code.
    """

    def __init__(
        self, forward: Forward, work: Workspace, scheduler: Scheduler, groups: Sequence[Group], *, fixed: bool
    ) -> None:
        self._forward, self._work, self._scheduler = forward, work, scheduler
        self._fixed = fixed
        self._device = work.device
        self._on_card = work.device.type == "cuda"
        self._steps = STEPS[work.device.type]
        self._pending: deque[_Drawn] = deque()
        self._draining = False
        self._tables: Any = None  # what the page tables on the device were made from
        self._bucket = 0
        self._prefixes: dict[int, int] = {}  # the most seen for a bucket: fewer would only mean one more capture
        rows = [row for group in groups for row in group.waiting]
        self._own_most = max((row.most for row in rows), default=1)
        self._prefix_most = max((len(group.prompt_tokens) for group in groups if group.shared), default=1)
        self._kv_heads = work.cache.keys[0].shape[1]
        most = most_readers(forward.group)
        widest = max((len(group.waiting) for group in groups), default=1)
        self._readers = most if fixed else min(most, power_of_two(widest))
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count if self._on_card else 1

    # -- one round ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def round(self) -> None:
        """Compute the next contexts, let rows in, start a block of decoding steps."""
        if not self._forward.packed:
            return self._round_of_texts()
        self._compute(self._scheduler.plan())
        entering = self._scheduler.entering()
        if entering:
            self._enter(entering)
        rows = [row for row in self._scheduler.decoding if not row.exhausted]
        if rows:
            self._decode(min(self._steps, max(row.remaining for row in rows)))

    def settle(self) -> Iterator[list[tuple[Row, list[int], list[float]]]]:
        """What was drawn, oldest first. On a card the newest block stays out: it is read while the next one runs."""
        ahead = self._on_card and not self._draining and any(not row.exhausted for row in self._scheduler.decoding)
        while len(self._pending) > ahead:
            yield self._read(self._pending.popleft())

    def release(self, finished: Sequence[Row]) -> None:
        """Rows whose end the host has seen."""
        slots = [row.slot for row in finished if row.slot is not None]
        self._scheduler.release(finished)
        if slots:
            self._work.rows.end(slots)

    # -- contexts ----------------------------------------------------------------------------------------------------

    def _compute(self, pieces: Sequence[Piece]) -> None:
        if not pieces:
            return
        self._grow()
        hidden = self._forward.context(pieces, self._work.cache)
        at = -1
        for piece in pieces:
            at += piece.stop - piece.start
            if piece.stop == len(piece.owner.context):
                piece.owner.last_hidden = hidden[at].clone()  # a view would keep the whole forward's output

    def _enter(self, rows: list[Row]) -> None:
        """Each row draws the token after its context and takes its slot."""
        state, out = self._first_draw(rows)
        self._work.rows.put([row.slot for row in rows], state)
        self._pending.append(_Drawn(list(zip(rows, range(len(rows)), strict=True)), Fetch(out.tokens, out.logprobs)))

    def _first_draw(self, rows: list[Row]) -> tuple[RowState, Output]:
        owners = {id(row.last_hidden): row.last_hidden for row in rows}  # a group's rows share theirs
        number = {key: index for index, key in enumerate(owners)}
        stacked = torch.stack(list(owners.values()))
        if self._fixed:  # one product shape, whatever else enters
            logits = torch.cat([self._forward.logits(h[None]) for h in stacked])
        else:
            logits = self._forward.logits(stacked)
        which = torch.tensor([number[id(row.last_hidden)] for row in rows], device=self._device)
        logits = logits[which]
        state = entering_state(rows, self._device)
        out = new_output(1, len(rows), self._device, logits.dtype)
        advance(state, *pick(logits, state, filtered=any(row.params.filtered for row in rows)), out)
        return state, out

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self, steps: int) -> None:
        if not self._make_room(steps):
            return
        self._grow()
        rows = self._scheduler.decoding
        self._choose_bucket(len(rows))
        shape = self._shape(rows)
        made_from = shape, [(id(row), row.slot, len(row.pages)) for row in rows]
        if made_from != self._tables:
            self._tables = made_from
            if self._work.tables.fill(shape, rows):
                self._work.forget_steps()
        kind = StepKind(shape, any(row.params.filtered for row in rows))
        columns = [(row, row.slot) for row in rows]
        self._pending.append(_Drawn(columns, self._work.run_steps(kind, steps)))

    def _make_room(self, steps: int) -> bool:
        """Pages for the coming steps. Where there are none the youngest rows give way, once all their tokens are known:
        until then nothing is started."""
        self._draining = False
        if self._scheduler.reserve(steps):
            return True
        if self._pending:
            self._draining = True
            return False
        while not self._scheduler.reserve(steps):
            slot = self._scheduler.evict()
            if slot is not None:
                self._work.rows.end([slot])
        return bool(self._scheduler.decoding)

    def _grow(self) -> None:
        if self._work.cache.grow(self._scheduler.pool.touched):
            self._work.forget_steps()

    def _choose_bucket(self, count: int) -> None:
        """Rows of the step: the slots in use, moved together where that saves rows and nobody waits to fill them."""
        scheduler = self._scheduler
        if self._fixed:
            self._bucket = min(FIXED_ROWS, self._work.max_rows)
            return
        fitting = self._bucket_for(count)
        used = 1 + max(row.slot for row in scheduler.decoding)
        if used > fitting and not scheduler.waiting:
            self._work.rows.move(scheduler.compact(fitting))
            used = fitting
        self._bucket = self._bucket_for(used)

    def _bucket_for(self, count: int) -> int:
        if not self._on_card:
            return count
        return min(self._work.max_rows, next((size for size in BUCKETS if size >= count), count))

    def _shape(self, rows: Sequence[Row]) -> TableShape:
        """On a card sizes are those of the whole run, so that few steps are captured; elsewhere what is in use."""
        segments = count_segments(rows, self._readers)
        if self._on_card:
            needed = min(self._bucket, power_of_two(segments)) if segments else 0
            needed = self._prefixes[self._bucket] = max(needed, self._prefixes.get(self._bucket, 0))
            own = power_of_two(self._own_most, PAGE)
            prefix = self._prefix_most
        else:
            needed, own = segments, max(len(row.pages) for row in rows) * PAGE
            prefix = max((len(row.group.pages) for row in rows if row.group.shared), default=1) * PAGE
        return table_shape(
            self._bucket,
            needed,
            own_tokens=own,
            prefix_tokens=prefix,
            readers=self._readers,
            kv_heads=self._kv_heads,
            processors=self._processors,
            fixed=self._fixed,
        )

    def _read(self, drawn: _Drawn) -> list[tuple[Row, list[int], list[float]]]:
        tokens, logprobs = (array.T for array in drawn.fetch.arrays())  # (B, steps)
        counts = (tokens >= 0).sum(1)
        if not np.isfinite(logprobs[tokens >= 0]).all():
            self._refuse(drawn, tokens, logprobs)
        tokens, logprobs = tokens.tolist(), logprobs.tolist()
        return [
            (row, tokens[at][: counts[at]], logprobs[at][: counts[at]])
            for row, at in drawn.rows
            if counts[at] and not row.finished
        ]

    def _refuse(self, drawn: _Drawn, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        for row, at in drawn.rows:
            for step, (token, value) in enumerate(zip(tokens[at], logprobs[at], strict=True)):
                if token >= 0 and not math.isfinite(value) and not row.finished:
                    raise ModelError(
                        f"the model gave logits that are not finite (prompt {row.request}, token "
                        f"{len(row.tokens) + step}, log-prob {value}); its weights or the adapter hold NaN or inf, or the "
                        "compute type overflows: try dtype='float32'"
                    )

    # -- models without a cache --------------------------------------------------------------------------------------

    def _round_of_texts(self) -> None:
        """Every text from its start, for models that cannot continue a cache."""
        self._scheduler.plan()
        rows = self._scheduler.rows
        texts = [[*row.group.prompt_tokens, *row.tokens] for row in rows]
        ends = np.cumsum([len(text) for text in texts]) - 1
        hidden = self._forward.texts(texts, self._device)
        for row, end in zip(rows, ends, strict=True):
            row.last_hidden = hidden[end]
        _, out = self._first_draw(rows)
        self._pending.append(_Drawn(list(zip(rows, range(len(rows)), strict=True)), Fetch(out.tokens, out.logprobs)))


class SamplerEngine:
    """Samples from one model on one device.

    Between runs it keeps the cache's storage and the captured steps where `keep_bytes` allows, never what is stored: no
    key outlives its run, so none is read with other weights than it was made with.

    Args:
        layers, kv_heads, head_dim, dtype: of the key-value cache.
        max_rows: samples decoded together. token_budget: tokens the cache may hold; more wait their turn.
        max_positions: the model's context. vocab_size: ids a prompt may hold. prefill_chunk: context tokens a forward.
        head_path: the head's key in `pairs`, for adapters that train it.
        fused: the road's decoding step, see `model.decode`; None decodes through the road itself.
    """

    def __init__(
        self,
        road: Road,
        head: Head,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rows: int,
        token_budget: int,
        max_positions: int,
        vocab_size: int,
        prefill_chunk: int = 2048,
        head_path: str = "lm_head",
        heads: int | None = None,
        fused: DecodeRoad | None = None,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_positions", max_positions), ("prefill_chunk", prefill_chunk)):
            assert value >= 1, f"{name} must be 1 or more, got {value}"
        assert token_budget >= PAGE, f"token_budget must be at least a page of {PAGE} tokens, got {token_budget}"
        self.forward = Forward(road, head, head_path=head_path, group=(heads or kv_heads) // kv_heads, fused=fused)
        self._vocab_size = vocab_size
        self._cache_shape = dict(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=device)
        self._device = torch.device(device)
        self._max_rows, self._max_positions, self._prefill_chunk = max_rows, max_positions, prefill_chunk
        self.token_budget = token_budget
        self.keep_bytes = 0
        self._idle: Workspace | None = None

    @property
    def kept_bytes(self) -> int:
        """Memory of the workspace that waits for the next run."""
        return 0 if self._idle is None else self._idle.nbytes

    def run(
        self,
        requests: Sequence[Request],
        *,
        pairs: Mapping,
        scale: float,
        tokenizer: Any = None,
        stream: bool = False,
        skip_special_tokens: bool = False,
        progress: Callable[[Progress], None] | None = None,
        pauses: bool = False,
        deterministic: bool = False,
    ) -> Iterator[Delta | Finished | None]:
        """Sample every request; a `Finished` for each sample as it ends, with `stream` a `Delta` for each token before.

        Requests are checked here, before the first event. Close the iterator to stop early.

        Args:
            pairs, scale: the adapter, as the road takes it; fixed for the run, so cached keys never mix versions.
            tokenizer: gives the text; None for tokens only.
            pauses: also yield None after every round, where whoever holds the device may let others go first.
            deterministic: the same bits whatever else the run holds, at the price of fixed sizes of all products.
        """
        on_card = self._device.type == "cuda"
        deterministic = deterministic and on_card  # a CPU's products do not change with the batch by design of the step
        groups = build_groups(
            requests,
            max_positions=self._max_positions,
            vocab_size=self._vocab_size,
            tokenizer=tokenizer,
            stream=stream,
            skip_special_tokens=skip_special_tokens,
            share=True if deterministic else None if self.forward.packed else False,
        )
        rows = min(self._max_rows, FIXED_ROWS) if deterministic else self._max_rows
        scheduler = Scheduler(
            groups,
            pool=PagePool(min(self.token_budget // PAGE, _pages_wanted(groups, rows))),
            budget=self.token_budget,
            max_rows=rows,
            prefill_chunk=self._prefill_chunk,
            admit_at=max(1, rows // 16) if on_card else 1,
            alone=deterministic,
        )
        total = sum(request.n for request in requests)
        return self._events(
            scheduler,
            groups,
            (pairs, scale),
            report=_Report(total, progress),
            stream=stream,
            pauses=pauses,
            deterministic=deterministic,
        )

    def collect(
        self,
        requests: Sequence[Request],
        *,
        pairs: Mapping,
        scale: float,
        tokenizer: Any = None,
        skip_special_tokens: bool = False,
        progress: Callable[[Progress], None] | None = None,
        deterministic: bool = False,
    ) -> list[list[Finished]]:
        """`run` to the end: the n samples of each request, in the order of the requests."""
        results: list[list[Any]] = [[None] * request.n for request in requests]
        events = self.run(
            requests,
            pairs=pairs,
            scale=scale,
            tokenizer=tokenizer,
            skip_special_tokens=skip_special_tokens,
            progress=progress,
            deterministic=deterministic,
        )
        for event in events:
            results[event.request][event.sample] = event
        return results

    @torch.no_grad()
    def prompt_logprobs(self, tokens: Sequence[int], *, pairs: Mapping, scale: float) -> list[float | None]:
        """Log-prob of each token given those before it; None for the first, which nothing precedes."""
        prompt = Request(tuple(tokens)).prompt_tokens
        check_ids(prompt, vocab_size=self._vocab_size)
        if len(prompt) > self._max_positions:
            raise UsageError(
                f"got {len(prompt)} tokens to score, the model's context is {self._max_positions}; score a shorter text"
            )
        pages, budget = pages_for(len(prompt)), self.token_budget // PAGE
        if pages > budget:
            raise UsageError(
                f"got {len(prompt)} tokens to score, the sampler's cache budget is {budget * PAGE}; score a shorter text"
            )
        self.forward.bind(pairs, scale, anew=True)
        group = Group(prompt, shared=True, pages=list(range(1, pages + 1)))
        work = self._take(pages)
        try:
            work.cache.grow(pages + 1, keep=False)
            parts = [self._score(group, start, work) for start in range(0, len(prompt), self._chunk(len(prompt)))]
            return [None, *torch.cat(parts).tolist()]
        finally:
            self._give_back(work)

    def _chunk(self, length: int) -> int:
        return self._prefill_chunk if self.forward.packed else length

    def _score(self, group: Group, start: int, work: Workspace) -> Tensor:
        """Log-probs of the tokens after start, start + 1, ... up to a chunk."""
        prompt = group.prompt_tokens
        stop = min(len(prompt), start + self._chunk(len(prompt)))
        if self.forward.packed:
            hidden = self.forward.context([Piece(group, start, stop)], work.cache)
        else:
            hidden = self.forward.texts([prompt], work.device)
        targets = torch.tensor(prompt[start + 1 : stop + 1], device=hidden.device)
        parts = [
            torch.log_softmax(self.forward.logits(hidden[: len(targets)][i : i + HEAD_ROWS]), -1)
            .gather(1, targets[i : i + HEAD_ROWS, None])
            .flatten()
            for i in range(0, len(targets), HEAD_ROWS)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0)

    # -- the workspace -----------------------------------------------------------------------------------------------

    def _take(self, pages: int) -> Workspace:
        """The idle workspace, or a new one where another run has it, with room for so many pages."""
        work, self._idle = self._idle, None
        if work is None:
            work = Workspace(self.forward, shape=self._cache_shape, max_rows=self._max_rows)
        if self._device.type == "cuda" and work.cache.grow(pages + 1, keep=False):
            work.forget_steps()
        return work

    def _give_back(self, work: Workspace) -> None:
        if self._idle is None and work.nbytes <= self.keep_bytes:
            work.clear()
            self._idle = work
        else:
            work.free()

    def free(self) -> None:
        """Let go of what is kept between runs."""
        work, self._idle = self._idle, None
        if work is not None:
            work.free()
        self.forward.unbind()

    # -- events ------------------------------------------------------------------------------------------------------

    def _events(
        self,
        scheduler: Scheduler,
        groups: list[Group],
        adapter: tuple[Mapping, float],
        *,
        report: _Report,
        stream: bool,
        pauses: bool,
        deterministic: bool,
    ) -> Iterator[Delta | Finished | None]:
        if not scheduler.unfinished:
            return
        whole = False
        work = self._take(scheduler.pool.pages)
        try:
            run = _Run(self.forward, work, scheduler, groups, fixed=deterministic)
            self.forward.bind(*adapter, anew=True)
            while scheduler.unfinished:
                self.forward.bind(*adapter)  # another run may have had its turn
                run.round()
                for drawn in run.settle():
                    deltas = [delta for row, *new in drawn for delta in row.extend(*new)]
                    done = [row for row, *_ in drawn if row.finished]
                    run.release(done)
                    report.add(len(done), sum(len(tokens) for _, tokens, _ in drawn))
                    if stream:
                        yield from deltas
                    for row in done:
                        yield row.result()
                if pauses:
                    yield None
            whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            # What an error or an interrupt has left half done is not used again.
            self._give_back(work) if whole else work.free()


class _Report:
    """Counts for whoever watches."""

    def __init__(self, total: int, watch: Callable[[Progress], None] | None) -> None:
        self._total, self._watch = total, watch
        self._finished = self._tokens = 0

    def add(self, finished: int, tokens: int) -> None:
        self._finished, self._tokens = self._finished + finished, self._tokens + tokens
        if self._watch is not None and tokens:
            self._watch(Progress(self._finished, self._total, self._tokens))


def _pages_wanted(groups: Sequence[Group], rows: int) -> int:
    """Pages with which no row ever waits for another's: the cache need not be larger."""
    own = sorted((pages_for(row.most) + 1 for group in groups for row in group.waiting), reverse=True)
    prompts = sorted((pages_for(len(group.prompt_tokens)) for group in groups if group.shared), reverse=True)
    return sum(own[:rows]) + sum(prompts[:rows]) + min(rows, len(own))
