"""One run's work on a device: contexts are computed, rows draw and advance, the host reads a block of steps later.

Shapes: B decoding rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ModelError
from ..model.kernels import power_of_two
from ..model.kernels.draw import Output, RowState, advance
from .forward import Forward
from .group import PAGE, Group
from .group import Sequence as Row
from .rows import TableShape, count_segments, entering_state, most_readers, new_output, table_shape, upload
from .scheduler import Piece, Scheduler
from .workspace import BUCKETS, STEPS, Fetch, StepKind, Workspace, pick

FIXED_ROWS = 64  # rows of every step where results must not depend on the batch


@dataclass(frozen=True)
class _Drawn:
    """Rows with their columns in what a block of steps draws."""

    rows: list[tuple[Row, int]]
    fetch: Fetch


class Run:
    """One run's work on the device.

    Gradients are off by no_grad, not inference_mode: tables a road makes and keeps on first use (rope, dequantised
    weights) would be inference tensors, which a later training step may not save for its backward. The mode wraps
    single rounds, never a yield, where it would leak into the caller's code.
    """

    def __init__(
        self,
        forward: Forward,
        work: Workspace,
        scheduler: Scheduler,
        groups: Sequence[Group],
        *,
        fixed: bool,
        stream: bool,
    ) -> None:
        self._forward, self._work, self._scheduler = forward, work, scheduler
        self._fixed, self._stream = fixed, stream
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
        keys = work.cache.keys[0]
        self._kv_heads, self._head_bytes = keys.shape[1], keys.shape[3] * keys.element_size()
        most = most_readers(forward.group)
        widest = max((len(group.waiting) for group in groups), default=1)
        self._readers = most if fixed else min(most, power_of_two(widest))
        self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count if self._on_card else 1

    # -- one round ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def round(self) -> None:
        """Compute the next contexts, let rows in, start a block of decoding steps once no context is left to compute: a
        step reads all weights, for few rows as for many. Only a stream does not wait for those behind it."""
        if not self._forward.packed:
            return self._round_of_texts()
        self._compute(self._scheduler.plan())
        entering = self._scheduler.entering()
        if entering:
            self._enter(entering)
        if self._scheduler.computing and not self._stream:
            return
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
        which = upload(np.array([number[id(row.last_hidden)] for row in rows]), self._device)
        logits = logits[which]
        filtered = any(row.params.filtered for row in rows)

        def drawn() -> tuple[RowState, Output]:
            state, out = entering_state(rows, self._device), new_output(1, len(rows), self._device, logits.dtype)
            advance(state, *pick(logits, state, filtered=filtered), out)
            return state, out

        self._forward.compile_once(("draws", filtered), drawn, self._device)
        return drawn()

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
            prefix = max((len(row.group.all_pages) for row in rows if row.group.shared), default=1) * PAGE
        return table_shape(
            self._bucket,
            needed,
            own_tokens=own,
            prefix_tokens=prefix,
            readers=self._readers,
            kv_heads=self._kv_heads,
            head_bytes=self._head_bytes,
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
        texts = [[*row.prompt_tokens, *row.tokens] for row in rows]
        ends = np.cumsum([len(text) for text in texts]) - 1
        hidden = self._forward.texts(texts, self._device)
        for row, end in zip(rows, ends, strict=True):
            row.last_hidden = hidden[end]
        _, out = self._first_draw(rows)
        self._pending.append(_Drawn(list(zip(rows, range(len(rows)), strict=True)), Fetch(out.tokens, out.logprobs)))
