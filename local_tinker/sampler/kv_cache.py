"""Keys and values of running sequences in pages, and the attention of prompts over them.

Shapes: N packed tokens, B decoding rows, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..model.attention import VarlenCausal
from ..model.kernels.decode_attention import decode_attention
from ..model.kernels.paged import PagedRows
from .group import PAGE
from .rows import upload
from .scheduler import Piece


class KVCache:
    """Storage of pages: one key and one value tensor (pages, Hkv, PAGE, D) a layer. Page 0 is nobody's."""

    def __init__(
        self, *, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        empty = torch.empty(0, kv_heads, PAGE, head_dim, dtype=dtype, device=device)
        self.keys, self.values = [empty] * layers, [empty] * layers

    @property
    def pages(self) -> int:
        """Pages that fit without growing, page 0 included."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in (*self.keys, *self.values))

    def grow(self, pages: int, *, keep: bool = True) -> bool:
        """Make room for so many pages, keeping what is stored or not; whether storage has moved."""
        if pages <= self.pages:
            return False
        if keep:
            pages = max(pages, self.pages * 3 // 2)
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):
                stored[layer] = old[:0]
                # Zeros, not empty: a masked key has weight 0, and 0 * NaN of fresh memory would be NaN.
                new = old.new_zeros(pages, *old.shape[1:])
                if keep:
                    new[: old.shape[0]] = old
                stored[layer] = new
        return True

    def lines(self, page: Tensor, place: Tensor) -> Tensor:
        """Page numbers and places within them (T,) -> (T * Hkv,), where a token's heads stand one after the other among
        the lines (pages * Hkv * PAGE, D) of a layer.

        Read and written as `keys[page, :, place]`, a layer's storage would be turned over, and written so where torch may
        use deterministic kernels alone, it is copied whole, there and back.
        """
        heads = self.keys[0].shape[1]
        return ((page[:, None] * heads + torch.arange(heads, device=page.device)) * PAGE + place[:, None]).flatten()

    def put(self, layer: int, lines: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (T, Hkv, D)."""
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            width = stored.shape[-1]
            stored.view(-1, width).index_copy_(0, lines, new.to(stored.dtype).reshape(-1, width))

    def take(self, layer: int, lines: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (T, Hkv, D)."""
        _, heads, _, width = self.keys[layer].shape
        keys, values = (stored[layer].view(-1, width).index_select(0, lines) for stored in (self.keys, self.values))
        return keys.view(-1, heads, width), values.view(-1, heads, width)

    def free(self) -> None:
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):
                stored[layer] = old.new_empty(0, *old.shape[1:])


def places(pages: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Page number and place within it of tokens start..stop-1 of a list of pages, (2, stop - start)."""
    at = np.arange(start, stop)
    return np.stack([np.asarray(pages)[at // PAGE], at % PAGE])


class PromptAttend:
    """Attention of one forward over pieces of contexts: writes keys and values, then reads what came before as well."""

    def __init__(self, cache: KVCache, pieces: Sequence[Piece]) -> None:
        self._cache = cache
        self._write = _joined([places(p.owner.pages, p.start, p.stop) for p in pieces], cache)
        queries = [0, *accumulate(p.stop - p.start for p in pieces)]
        keys = [0, *accumulate(p.owner.offset + p.stop for p in pieces)]
        self._seen = None if keys == queries else _joined([_seen(piece) for piece in pieces], cache)
        self._attend = VarlenCausal(queries, cache.device, cu_keys=keys)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q (N, Hq, D), k and v (N, Hkv, D) -> (N, Hq, D)."""
        self._cache.put(layer, self._write, k, v)
        if self._seen is not None:
            k, v = self._cache.take(layer, self._seen)
        return self._attend(layer, q, k, v, scale=scale, window=window, softcap=softcap)


def _seen(piece: Piece) -> np.ndarray:
    """Where all stands that a piece sees, itself included."""
    own = places(piece.owner.pages, 0, piece.stop)
    return np.concatenate([places(piece.owner.before, 0, piece.owner.offset), own], 1) if piece.owner.offset else own


def _joined(found: Sequence[np.ndarray], cache: KVCache) -> Tensor:
    return cache.lines(*upload(np.concatenate(found, 1), cache.device))


class DecodeAttend:
    """Attention of one decoding step, for a road that knows nothing of pages."""

    def __init__(self, cache: KVCache, rows: PagedRows) -> None:
        self._cache, self._rows = cache, rows
        last = (rows.own_length - 1).long()
        page = rows.own_pages.gather(1, (last // PAGE)[:, None])[:, 0].long()
        self._write = cache.lines(page, last % PAGE)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q (B, Hq, D), k and v (B, Hkv, D) -> (B, Hq, D)."""
        self._cache.put(layer, self._write, k, v)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = decode_attention(q.contiguous(), keys, values, self._rows, scale=scale, window=window, softcap=softcap)
        return out.view_as(q)
