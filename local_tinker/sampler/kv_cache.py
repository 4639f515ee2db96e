"""Keys and values of running sequences in pages, and the attention over them.

A prompt is stored once for all its samples; each sample has pages of its own for what comes after.
Shapes: N packed tokens, B decoding rows, S stored segments of one attention call, Q rows that read a segment, L keys of
it, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scheduler import PAGE, PagePool, pages_for

_KEYS_PER_CALL = 2**15  # gathered keys at a time: 128 MiB of fp32 keys at 8 heads of 128
_SCORES_PER_CALL = 2**26  # fp32 scores at a time where they are formed in full


class KVCache:
    """Storage behind a `PagePool`: one key and one value tensor (tokens, Hkv, D) a layer, grown on demand.

    Args:
        tokens: the most it may ever hold; rounded down to whole pages.
    """

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, tokens: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.pool = PagePool(tokens // PAGE)
        self.device = torch.device(device)
        empty = torch.empty(0, kv_heads, head_dim, dtype=dtype, device=device)
        self.keys, self.values = [empty] * layers, [empty] * layers

    @property
    def tokens(self) -> int:
        """Tokens that fit without growing."""
        return self.keys[0].shape[0]

    def grow(self) -> None:
        """Make room for every page the pool has handed out."""
        if self.pool.touched * PAGE <= self.tokens:
            return
        wanted = min(self.pool.pages * PAGE, max(self.pool.touched * PAGE, self.tokens * 3 // 2))
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):
                # Zeros, not empty: a masked key has weight 0, and 0 * NaN of fresh memory would be NaN.
                new = old.new_zeros(wanted, *old.shape[1:])
                new[: old.shape[0]] = old
                stored[layer] = new

    def free(self) -> None:
        self.keys.clear()
        self.values.clear()


def slots_of(pages: Tensor) -> Tensor:
    """Page numbers (..., P) -> token slots (..., P * PAGE)."""
    offsets = torch.arange(PAGE, device=pages.device)
    return (pages[..., None] * PAGE + offsets).flatten(-2)


@dataclass(frozen=True)
class PromptPiece:
    """Tokens start..stop-1 of one prompt, packed from row `begin` of the forward on; earlier ones are in the cache."""

    begin: int
    start: int
    stop: int
    slots: Tensor  # (stop,) where positions 0..stop-1 are stored

    @property
    def rows(self) -> slice:
        return slice(self.begin, self.begin + self.stop - self.start)


@dataclass(frozen=True)
class _Segments:
    """S segments read together.

    Attributes:
        slots: (S, L). readers: (S, Q) rows that read each, padded with row 0.
        rows: (R,) the rows served here. places: (R,) where each stands in the flattened (S, Q).
    """

    slots: Tensor
    readers: Tensor
    rows: Tensor
    places: Tensor


class DecodeRows:
    """Where B decoding rows find their keys. Valid while the rows stay the same and `steps_left` is above 0.

    Args:
        prompts: pages and token count of each distinct prompt. prompt_of: (B,) its index for each row.
        suffixes: pages of each row, enough for all it may come to store. suffix_lens: tokens of the row already stored.
        steps: decode steps the tables are made for; more would gather keys that nobody has written yet.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[tuple[list[int], int]],
        prompt_of: Sequence[int],
        suffixes: Sequence[list[int]],
        suffix_lens: Sequence[int],
        steps: int,
        device: torch.device,
    ) -> None:
        readers: list[list[int]] = [[] for _ in prompts]
        for row, prompt in enumerate(prompt_of):
            readers[prompt].append(row)
        ends = [min(pages_for(n + steps), len(p)) for p, n in zip(suffixes, suffix_lens, strict=True)]
        own = [pages[:end] for pages, end in zip(suffixes, ends, strict=True)]
        self.steps_left = steps
        self.prompt_lens = torch.tensor([prompts[p][1] for p in prompt_of], device=device)  # (B,)
        self.suffix_lens = torch.tensor(suffix_lens, device=device)  # (B,)
        self._table = _padded(own, device=device)  # (B, P)
        self._prompt_calls = _segment_calls([pages for pages, _ in prompts], readers, device=device)
        self._suffix_calls = _segment_calls(own, [[row] for row in range(len(own))], device=device)

    def write_slots(self) -> Tensor:
        """(B,) where this step's keys go."""
        page = self._table.gather(1, (self.suffix_lens // PAGE)[:, None])[:, 0]
        return page * PAGE + self.suffix_lens % PAGE

    def advance(self) -> None:
        self.suffix_lens += 1
        self.steps_left -= 1

    def calls(self, *, window: int | None) -> tuple[list[tuple[_Segments, Tensor]], list[tuple[_Segments, Tensor]]]:
        """(prompt, suffix) attention calls of this step, each with its mask (S, Q, L) of visible keys.

        This step's own key is the last visible one, at position prompt_lens + suffix_lens.
        """
        position = self.prompt_lens + self.suffix_lens
        none = torch.zeros_like(self.prompt_lens)
        prompt = [(c, _visible(c, none, self.prompt_lens, position, window)) for c in self._prompt_calls]
        suffix = [
            (c, _visible(c, self.prompt_lens, self.suffix_lens + 1, position, window)) for c in self._suffix_calls
        ]
        return prompt, suffix


def _padded(rows: Sequence[Sequence[int]], *, device: torch.device) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def _segment_calls(
    pages: Sequence[list[int]], readers: Sequence[list[int]], *, device: torch.device
) -> list[_Segments]:
    """Longest first, cut so that padding every segment of a call to its longest stays within `_KEYS_PER_CALL`."""
    order = sorted(range(len(pages)), key=lambda i: -len(pages[i]))
    calls = []
    while order:
        count = max(1, _KEYS_PER_CALL // (PAGE * len(pages[order[0]])))
        picked, order = order[:count], order[count:]
        width = max(len(readers[i]) for i in picked)
        rows = [row for i in picked for row in readers[i]]
        places = [s * width + q for s, i in enumerate(picked) for q in range(len(readers[i]))]
        calls.append(
            _Segments(
                slots=slots_of(_padded([pages[i] for i in picked], device=device)),
                readers=_padded([readers[i] for i in picked], device=device),
                rows=torch.tensor(rows, device=device),
                places=torch.tensor(places, device=device),
            )
        )
    return calls


def _visible(call: _Segments, base: Tensor, length: Tensor, position: Tensor, window: int | None) -> Tensor:
    """Mask (S, Q, L): key j stands at base + j, exists for j < length, is seen for position - window < base + j."""
    j = torch.arange(call.slots.shape[1], device=call.slots.device)
    mask = j < length[call.readers][..., None]
    if window is not None:
        mask &= base[call.readers][..., None] + j > (position[call.readers] - window)[..., None]
    return mask


class CacheAttend:
    """Attention of one forward over [B decoding rows | prompt pieces]: writes keys and values, then reads.

    A call per layer; masks are made once per window size.
    """

    def __init__(self, cache: KVCache, *, decode: DecodeRows | None, pieces: Sequence[PromptPiece]) -> None:
        self._cache, self._decode, self._pieces = cache, decode, pieces
        slots = [decode.write_slots()] if decode is not None else []
        slots += [piece.slots[piece.start :] for piece in pieces]
        self._write = torch.cat(slots)  # (N,)
        self._calls: dict[int | None, tuple] = {}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q (N, Hq, D), k and v (N, Hkv, D) -> (N, Hq, D)."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._write, k.to(keys.dtype))
        values.index_copy_(0, self._write, v.to(values.dtype))
        out = torch.empty_like(q)
        if self._decode is not None:
            rows = self._decode.prompt_lens.shape[0]
            if window not in self._calls:
                self._calls[window] = self._decode.calls(window=window)
            prompt, suffix = self._calls[window]
            first = _attend_segments(q[:rows], keys, values, prompt, scale=scale, softcap=softcap)
            second = _attend_segments(q[:rows], keys, values, suffix, scale=scale, softcap=softcap)
            out[:rows] = _merge(first, second).to(q.dtype)
        for piece in self._pieces:
            whole = (k[piece.rows], v[piece.rows]) if piece.start == 0 else (keys[piece.slots], values[piece.slots])
            out[piece.rows] = _attend_piece(q[piece.rows], *whole, scale=scale, window=window, softcap=softcap)
        return out


def _attend_piece(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The last M of L positions: q (M, Hq, D), k and v (L, Hkv, D) -> (M, Hq, D), causal."""
    count, length = q.shape[0], k.shape[0]
    if window is not None and window >= length:
        window = None
    query = torch.arange(length - count, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)
    if softcap is not None:
        step = max(1, _SCORES_PER_CALL // (q.shape[1] * length))
        parts = []
        for begin in range(0, count, step):
            at = query[begin : begin + step]
            part, _ = _partial(
                q[None, begin : begin + step], k[None], v[None], _causal(at, key, window)[None], scale, softcap
            )
            parts.append(part[0])
        return torch.cat(parts).to(q.dtype)
    repeat = q.shape[1] // k.shape[1]
    # Heads repeated by hand: on CUDA a mask together with enable_gqa falls back to forming every score in memory.
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
    if count == length and window is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_causal(query, key, window), scale=scale)
    return out[0].transpose(0, 1)


def _causal(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def _attend_segments(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    calls: Sequence[tuple[_Segments, Tensor]],
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Each of B rows over its one segment: q (B, Hq, D) -> output (B, Hq, D) and log-sum-exp (B, Hq) of its scores."""
    wide = _wide(q.dtype)
    out, lse = q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:2], dtype=wide)
    for call, mask in calls:
        part, part_lse = _partial(q[call.readers], keys[call.slots], values[call.slots], mask, scale, softcap)
        out[call.rows] = part.flatten(0, 1)[call.places]
        lse[call.rows] = part_lse.flatten(0, 1)[call.places]
    return out, lse


def _partial(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """q (S, Q, Hq, D), k and v (S, L, Hkv, D), mask (S, Q, L) -> output (S, Q, Hq, D), log-sum-exp (S, Q, Hq), fp32+.

    A row that sees no key gives output 0 and log-sum-exp -inf.
    """
    segments, readers, heads, width = q.shape
    shared = k.shape[2]
    wide = _wide(q.dtype)
    grouped = q.to(wide).view(segments, readers, shared, heads // shared, width).permute(0, 2, 1, 3, 4).flatten(2, 3)
    scores = grouped @ k.to(wide).permute(0, 2, 3, 1) * scale  # (S, Hkv, Q * repeat, L)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~mask[:, None].repeat_interleave(heads // shared, dim=2)
    scores = scores.masked_fill(hidden, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = weights @ v.to(wide).permute(0, 2, 1, 3) / total.clamp_min(torch.finfo(wide).tiny)
    lse = (top + total.log())[..., 0]
    out = out.view(segments, shared, readers, heads // shared, width).permute(0, 2, 1, 3, 4).flatten(2, 3)
    return out, lse.view(segments, shared, readers, heads // shared).permute(0, 2, 1, 3).flatten(2)


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two key sets from the attention over each; the second always holds the row's own key."""
    share = torch.sigmoid(second[1] - first[1])[..., None]
    return first[0] * (1 - share) + second[0] * share


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
