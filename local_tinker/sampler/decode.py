"""SamplerEngine: requests in, events out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..model.decode import DecodeRoad
from ..out_of_memory import until_it_fits
from .forward import Forward, Head, Road
from .group import PAGE, Group, pages_for
from .grouping import build_groups, check_ids
from .rows import upload
from .run import FIXED_ROWS
from .running import ADVICE, Running
from .scheduler import PagePool, Piece, Scheduler
from .sequence import Delta, Finished, Request
from .workspace import Workspace

HEAD_ROWS = 256  # rows of full logits at a time when a prompt is scored
SEEN_BYTES = 2**29  # keys and values of a layer that are gathered for a forward over contexts that go on


@dataclass(frozen=True)
class Progress:
    """How far a run has come: samples finished of all, tokens sampled so far."""

    finished: int
    total: int
    tokens: int


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
        spare: lets go of memory that nobody uses when there is too little; whether there was some.
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
        spare: Callable[[], bool] = lambda: False,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_positions", max_positions), ("prefill_chunk", prefill_chunk)):
            assert value >= 1, f"{name} must be 1 or more, got {value}"
        assert token_budget >= PAGE, f"token_budget must be at least a page of {PAGE} tokens, got {token_budget}"
        self.forward = Forward(road, head, head_path=head_path, group=(heads or kv_heads) // kv_heads, fused=fused)
        self._vocab_size = vocab_size
        self._cache_shape = dict(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=device)
        self._token_bytes = 2 * kv_heads * head_dim * dtype.itemsize  # of a layer
        self._device = torch.device(device)
        self._max_rows, self._max_positions, self.prefill_chunk = max_rows, max_positions, prefill_chunk
        self.token_budget = token_budget
        self.keep_bytes = 0
        self.spare = spare
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
        say: Callable[[str], None] = lambda line: None,
    ) -> Iterator[Delta | Finished | None]:
        """Sample every request; a `Finished` for each sample as it ends, with `stream` a `Delta` for each token before.

        Requests are checked here, before the first event. Close the iterator to stop early.

        Args:
            pairs, scale: the adapter, as the road takes it; fixed for the run, so cached keys never mix versions.
            tokenizer: gives the text; None for tokens only.
            pauses: also yield None after every round, where whoever holds the device may let others go first.
            deterministic: the same bits whatever else the run holds, at the price of fixed sizes of all products.
            say: told when memory ran out and the run goes on with less.

        Raises:
            DeviceMemoryError: from the iterator, when one row alone does not fit. The engine stays usable.
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
            prefill_chunk=self.prefill_chunk,
            seen_most=SEEN_BYTES // self._token_bytes,
            admit_at=max(1, rows // 16) if on_card else 1,
            alone=deterministic,
        )
        return self._events(
            scheduler,
            groups,
            (pairs, scale),
            report=_Report(sum(request.n for request in requests), progress),
            stream=stream,
            pauses=pauses,
            deterministic=deterministic,
            say=say,
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
        group = Group(prompt, shared=True, pages=list(range(1, pages + 1)))
        chunk = self.prefill_chunk if self.forward.packed else len(prompt)

        def step_down() -> bool:
            nonlocal chunk
            smaller = max(PAGE, chunk // 2) if self.forward.packed else chunk
            found, chunk = self.spare() or smaller < chunk, min(chunk, smaller)
            return found

        return until_it_fits(lambda: self._scores(group, chunk, (pairs, scale)), step_down=step_down, advice=ADVICE)

    def _scores(self, group: Group, chunk: int, adapter: tuple[Mapping, float]) -> list[float | None]:
        length, pages, work = len(group.prompt_tokens), len(group.pages), None
        try:
            self.forward.bind(*adapter, anew=True)
            work = self.take(pages)
            work.cache.grow(pages + 1, keep=False)
            parts = [self._score(group, start, chunk, work) for start in range(0, length, chunk)]
            return [None, *torch.cat(parts).tolist()]
        finally:
            if work is not None:
                self.give_back(work)

    def _score(self, group: Group, start: int, chunk: int, work: Workspace) -> Tensor:
        """Log-probs of the tokens after start, start + 1, ... up to a chunk."""
        prompt = group.prompt_tokens
        stop = min(len(prompt), start + chunk)
        if self.forward.packed:
            hidden = self.forward.context([Piece(group, start, stop)], work.cache)
        else:
            hidden = self.forward.texts([prompt], work.device)
        targets = upload(np.array(prompt[start + 1 : stop + 1], np.int64), hidden.device)
        parts = [
            torch.log_softmax(self.forward.logits(hidden[: len(targets)][i : i + HEAD_ROWS]), -1)
            .gather(1, targets[i : i + HEAD_ROWS, None])
            .flatten()
            for i in range(0, len(targets), HEAD_ROWS)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0)

    # -- the workspace -----------------------------------------------------------------------------------------------

    def take(self, pages: int) -> Workspace:
        """The idle workspace, or a new one where another run has it, with room for so many pages."""
        work, self._idle = self._idle, None
        if work is None:
            work = Workspace(
                self.forward, shape=self._cache_shape, max_rows=self._max_rows, positions=self._max_positions
            )
        if self._device.type == "cuda" and work.cache.grow(pages + 1, keep=False):
            work.forget_steps()
        return work

    def give_back(self, work: Workspace) -> None:
        if self._idle is None and work.nbytes <= self.keep_bytes:
            work.clear()
            self._idle = work
        else:
            work.free()

    def drop_idle(self) -> None:
        """Let go of the workspace that waits for the next run."""
        work, self._idle = self._idle, None
        if work is not None:
            work.free()

    def free(self) -> None:
        """Let go of what is kept between runs."""
        self.drop_idle()
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
        say: Callable[[str], None],
    ) -> Iterator[Delta | Finished | None]:
        if not scheduler.unfinished:
            return
        whole = False
        running = Running(self, scheduler, groups, adapter, fixed=deterministic, stream=stream, say=say)
        try:
            while scheduler.unfinished:
                drawn = running.next()
                if drawn is None:
                    if pauses:
                        yield None
                    continue
                deltas = [delta for row, *new in drawn for delta in row.extend(*new)]
                done = [row for row, *_ in drawn if row.finished]
                running.release(done)
                report.add(len(done), sum(len(tokens) for _, tokens, _ in drawn))
                if stream:
                    yield from deltas
                for row in done:
                    yield row.result()
            whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            running.end(whole)


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
    prompts = sorted((pages_for(len(group.context)) for group in groups if group.shared), reverse=True)
    bases = {id(part): pages_for(len(part.context)) for group in groups for part in group.chain[:-1]}
    return sum(own[:rows]) + sum(prompts[:rows]) + sum(bases.values()) + min(rows, len(own))
