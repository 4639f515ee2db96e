"""The sampling loop: forwards over running rows and prompt pieces, draws, events.

Shapes: N packed tokens, B decoding rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ModelError, UsageError
from ..model.attention import VarlenCausal
from .kv_cache import CacheAttend, DecodeRows, KVCache, PromptPiece, slots_of
from .pick import PickSettings, pick, uniforms
from .scheduler import PAGE, Piece, Scheduler, pages_for
from .sequence import Delta, Finished, Group, Request, build_groups, check_ids
from .sequence import Sequence as Row

_STEPS_AHEAD = 64  # decode steps between rebuilds of the key tables while the rows stay the same
_HEAD_ROWS = 256  # rows of full logits at a time when a prompt is scored


class Road(Protocol):
    """The model's forward over packed tokens, see `model.layer`."""

    def hidden(self, tokens: Tensor, *, positions: Tensor, attend: Any, pairs: Mapping, scale: float) -> Tensor: ...


class Head(Protocol):
    """Hidden states (N, H) -> fp32 logits (N, V); `pair` is the head's own adapter, see `model.head`."""

    def logits(self, hidden: Tensor, pair: Any, lora_scale: float) -> Tensor: ...


@dataclass(frozen=True)
class Progress:
    """How far a run has come: samples finished of all, tokens sampled so far."""

    finished: int
    total: int
    tokens: int


class _Draws:
    """Seeds, positions and settings of some rows; positions count the row's own tokens from 0."""

    def __init__(self, rows: Sequence[Row], *, device: torch.device) -> None:
        self.rows = list(rows)
        self._seeds = torch.tensor([row.seed for row in rows], device=device)
        self._positions = torch.tensor([len(row.tokens) for row in rows], device=device)
        self._settings = PickSettings.stack([row.params for row in rows], device=device)

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, V) -> tokens (B,), log-probs (B,); the next call draws at the next positions."""
        picked = pick(logits, uniforms(self._seeds, self._positions), self._settings)
        self._positions += 1
        return picked


class _Batch:
    """The decoding rows on the device. Rebuilt when rows come or go, otherwise advanced in place without the host."""

    def __init__(self, rows: Sequence[Row], *, device: torch.device) -> None:
        groups = {id(row.group): row.group for row in rows}
        number = {key: index for index, key in enumerate(groups)}
        stored = [len(row.tokens) - 1 for row in rows]  # the newest token is stored by the coming step
        self.keys = DecodeRows(
            prompts=[(group.pages, len(group.prompt_tokens)) for group in groups.values()],
            prompt_of=[number[id(row.group)] for row in rows],
            suffixes=[row.pages for row in rows],
            suffix_lens=stored,
            steps=_STEPS_AHEAD,
            device=device,
        )
        self.draws = _Draws(rows, device=device)
        self.tokens = torch.tensor([row.tokens[-1] for row in rows], device=device)
        self.positions = self.keys.prompt_lens + self.keys.suffix_lens

    def serves(self, rows: Sequence[Row]) -> bool:
        return self.keys.steps_left > 0 and self.draws.rows == list(rows)

    def advance(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.positions += 1
        self.keys.advance()


class _Decoder:
    """One run's forwards and draws.

    Gradients are off by no_grad, not inference_mode: tables a road makes and keeps on first use (rope, dequantised
    weights) would be inference tensors, which a later training step may not save for its backward. The mode wraps
    single steps, never a yield, where it would leak into the caller's code.
    """

    def __init__(self, road: Road, head: Head, cache: KVCache, *, head_path: str, pairs: Mapping, scale: float) -> None:
        self._road, self._head, self._cache = road, head, cache
        self._pairs = {path: pair for path, pair in pairs.items() if path != head_path}
        self._scale, self._head_pair = scale, pairs.get(head_path)
        self._batch: _Batch | None = None

    @torch.no_grad()
    def step(self, rows: Sequence[Row], pieces: Sequence[Piece]) -> list[tuple[Row, int, float]]:
        """One forward, and one new token for every row whose prompt is complete."""
        running = [row for row in rows if row.tokens]
        if not running:
            self._batch = None
        elif self._batch is None or not self._batch.serves(running):
            self._batch = _Batch(running, device=self._cache.device)
        hidden = self.forward(pieces)
        drawn = []
        if self._batch is not None:
            tokens, logprobs = self._batch.draws.pick(self.logits(hidden[: len(running)]))
            self._batch.advance(tokens)
            drawn += _to_host(running, tokens, logprobs)
        last = len(running) - 1
        for piece in pieces:
            last += piece.stop - piece.start
            if piece.stop == len(piece.group.prompt_tokens):
                piece.group.last_hidden = hidden[last].clone()  # a view would keep the whole forward's output
        first = [row for row in rows if not row.tokens and row.group.last_hidden is not None]
        if first:
            tokens, logprobs = _Draws(first, device=self._cache.device).pick(self._first_logits(first))
            drawn += _to_host(first, tokens, logprobs)
        return drawn

    def forward(self, pieces: Sequence[Piece]) -> Tensor | None:
        """Hidden states (N, H) of the batch's rows followed by the pieces; None when there is nothing to compute."""
        batch, device = self._batch, self._cache.device
        if batch is None and not pieces:
            return None
        if not getattr(self._road, "packed", True):
            return self._forward_whole(pieces)
        self._cache.grow()
        begin = 0 if batch is None else batch.tokens.shape[0]
        tokens = [] if batch is None else [batch.tokens]
        positions = [] if batch is None else [batch.positions]
        placed = []
        for piece in pieces:
            slots = slots_of(torch.tensor(piece.group.pages[: pages_for(piece.stop)], device=device))[: piece.stop]
            placed.append(PromptPiece(begin, piece.start, piece.stop, slots))
            tokens.append(torch.tensor(piece.group.prompt_tokens[piece.start : piece.stop], device=device))
            positions.append(torch.arange(piece.start, piece.stop, device=device))
            begin += piece.stop - piece.start
        attend = CacheAttend(self._cache, decode=None if batch is None else batch.keys, pieces=placed)
        return self._road.hidden(
            torch.cat(tokens), positions=torch.cat(positions), attend=attend, pairs=self._pairs, scale=self._scale
        )

    def _forward_whole(self, pieces: Sequence[Piece]) -> Tensor:
        """The same without the cache, every text from its start: right for any model, slow for long ones."""
        rows = [] if self._batch is None else self._batch.draws.rows
        texts = [[*row.group.prompt_tokens, *row.tokens] for row in rows]
        kept = [(len(text) - 1, len(text)) for text in texts]
        texts += [list(piece.group.prompt_tokens[: piece.stop]) for piece in pieces]
        kept += [(piece.start, piece.stop) for piece in pieces]
        edges = [0, *itertools.accumulate(map(len, texts))]
        device = self._cache.device
        hidden = self._road.hidden(
            torch.tensor([token for text in texts for token in text], device=device),
            positions=torch.cat([torch.arange(len(text), device=device) for text in texts]),
            attend=VarlenCausal(edges, device),
            pairs=self._pairs,
            scale=self._scale,
        )
        return torch.cat([hidden[edge + a : edge + b] for edge, (a, b) in zip(edges, kept, strict=False)])

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head.logits(hidden, self._head_pair, self._scale)

    def _first_logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits (B, V) after the prompt, computed once a group."""
        groups = {id(row.group): row.group for row in rows}
        number = {key: index for index, key in enumerate(groups)}
        logits = self.logits(torch.stack([group.last_hidden for group in groups.values()]))
        return logits[torch.tensor([number[id(row.group)] for row in rows], device=logits.device)]


def _to_host(rows: Sequence[Row], tokens: Tensor, logprobs: Tensor) -> list[tuple[Row, int, float]]:
    # One transfer: token ids are exact in fp64.
    ids, values = torch.stack([tokens.double(), logprobs.double()]).tolist()
    for row, value in zip(rows, values, strict=True):
        if not math.isfinite(value):
            raise ModelError(
                f"the model gave logits that are not finite (prompt {row.request}, token {len(row.tokens)}, "
                f"log-prob {value}); its weights or the adapter hold NaN or inf, or the compute type overflows: "
                "try dtype='float32'"
            )
    return [(row, int(token), value) for row, token, value in zip(rows, ids, values, strict=True)]


class SamplerEngine:
    """Samples from one model on one device. Keeps nothing between runs, so an abandoned run leaves nothing behind.

    Args:
        layers, kv_heads, head_dim, dtype: of the key-value cache.
        max_rows: samples decoded together. token_budget: tokens the cache may hold; more wait their turn.
        max_positions: the model's context. vocab_size: ids a prompt may hold. prefill_chunk: prompt tokens a forward.
        head_path: the head's key in `pairs`, for adapters that train it.
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
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_positions", max_positions), ("prefill_chunk", prefill_chunk)):
            assert value >= 1, f"{name} must be 1 or more, got {value}"
        assert token_budget >= PAGE, f"token_budget must be at least a page of {PAGE} tokens, got {token_budget}"
        self._road, self._head, self._head_path = road, head, head_path
        self._vocab_size = vocab_size
        self._cache_shape = {
            "layers": layers,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": dtype,
            "device": device,
        }
        self._max_rows, self._token_budget = max_rows, token_budget
        self._max_positions, self._prefill_chunk = max_positions, prefill_chunk

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
    ) -> Iterator[Delta | Finished | None]:
        """Sample every request; a `Finished` for each sample as it ends, with `stream` a `Delta` for each token before.

        Requests are checked here, before the first event. Close the iterator to stop early; its cache is freed then.

        Args:
            pairs, scale: the adapter, as the road takes it; fixed for the run, so cached keys never mix versions.
            tokenizer: gives the text; None for tokens only.
            pauses: also yield None after every step, where whoever holds the device may let others go first.
        """
        groups = build_groups(
            requests,
            max_positions=self._max_positions,
            vocab_size=self._vocab_size,
            tokenizer=tokenizer,
            stream=stream,
            skip_special_tokens=skip_special_tokens,
        )
        cache = self._new_cache()
        scheduler = Scheduler(groups, pool=cache.pool, max_rows=self._max_rows, prefill_chunk=self._prefill_chunk)
        decoder = self._decoder(cache, pairs=pairs, scale=scale)
        total = sum(request.n for request in requests)
        return _events(scheduler, decoder, cache, total=total, stream=stream, progress=progress, pauses=pauses)

    def collect(
        self,
        requests: Sequence[Request],
        *,
        pairs: Mapping,
        scale: float,
        tokenizer: Any = None,
        skip_special_tokens: bool = False,
        progress: Callable[[Progress], None] | None = None,
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
        cache = self._new_cache()
        needed = pages_for(len(prompt))
        if needed > cache.pool.pages:
            raise UsageError(
                f"got {len(prompt)} tokens to score, the sampler's cache budget is {cache.pool.pages * PAGE}; "
                "score a shorter text"
            )
        group = Group(prompt, pages=cache.pool.take(needed))
        decoder = self._decoder(cache, pairs=pairs, scale=scale)
        parts = []
        for start in range(0, len(prompt), self._prefill_chunk):
            stop = min(len(prompt), start + self._prefill_chunk)
            hidden = decoder.forward([Piece(group, start, stop)])
            targets = torch.tensor(prompt[start + 1 : stop + 1], device=hidden.device)
            parts += [
                torch.log_softmax(decoder.logits(hidden[: len(targets)][i : i + _HEAD_ROWS]).float(), -1)
                .gather(1, targets[i : i + _HEAD_ROWS, None])
                .flatten()
                for i in range(0, len(targets), _HEAD_ROWS)
            ]
        return [None, *(torch.cat(parts).tolist() if parts else [])]

    def _new_cache(self) -> KVCache:
        return KVCache(**self._cache_shape, tokens=self._token_budget)

    def _decoder(self, cache: KVCache, *, pairs: Mapping, scale: float) -> _Decoder:
        return _Decoder(self._road, self._head, cache, head_path=self._head_path, pairs=pairs, scale=scale)


def _events(
    scheduler: Scheduler,
    decoder: _Decoder,
    cache: KVCache,
    *,
    total: int,
    stream: bool,
    progress: Callable[[Progress], None] | None,
    pauses: bool,
) -> Iterator[Delta | Finished | None]:
    finished = tokens = 0
    try:
        while scheduler.unfinished:
            pieces = scheduler.plan()
            drawn = decoder.step(scheduler.rows, pieces)
            deltas = [row.push(token, logprob) for row, token, logprob in drawn]
            done = [row for row, _, _ in drawn if row.finished]
            scheduler.release(done)
            finished, tokens = finished + len(done), tokens + len(drawn)
            if progress is not None:
                progress(Progress(finished, total, tokens))
            if stream:
                yield from deltas
            for row in done:
                yield row.result()
            if pauses:
                yield None
    finally:
        cache.free()
