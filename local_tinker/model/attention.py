"""Causal attention over packed documents, and the function that puts it into transformers' own modules.

`VarlenCausal` is what training attends with. `register` makes the same available to any transformers model, so that the
plain road packs documents exactly as the fast road does.

Shapes: N packed tokens, Hq query heads, Hkv key-value heads (Hq a multiple), D head dimension, L queries and K keys of
one document (its last L tokens ask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError
from .kernels import KERNEL_DTYPES, triton_ready
from .kernels.attention import attend_packed, attend_packed_backward
from .kernels.packed_blocks import Document, PackedBlocks

ATTENTION_NAME = "local_tinker"
QUERY_BLOCK = 1024  # rows of soft-capped scores that exist at once


class Attend(Protocol):
    """Called once a layer with rotated, packed q (N, Hq, D) and k, v (N, Hkv, D)."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor: ...


class VarlenCausal:
    """Each document attends causally to itself alone, and to the prefix that it goes on from.

    Args:
        cu_seqlens: document i holds tokens cu_seqlens[i] to cu_seqlens[i + 1]; starts with 0, ends with N.
        device: where the tokens will be.
        cu_keys: the same of the keys, where the tokens are only the last of their documents; without gradients.
        prefixes: of each document the number of the one it goes on from, or None. Documents that go on from one stand
            right behind it, side by side.
    """

    def __init__(
        self,
        cu_seqlens: Sequence[int],
        device: torch.device | str,
        *,
        cu_keys: Sequence[int] | None = None,
        prefixes: Sequence[int | None] | None = None,
    ) -> None:
        assert cu_keys is None or prefixes is None, "documents that go on are whole"
        self.cu_seqlens = [int(edge) for edge in cu_seqlens]
        cu_keys = self.cu_seqlens if cu_keys is None else [int(edge) for edge in cu_keys]
        self.documents = _documents(self.cu_seqlens, cu_keys, prefixes)
        self.max_queries = max(d.asking for d in self.documents)
        self.max_length = max(d.before + d.length for d in self.documents)
        self.blocks = PackedBlocks(self.documents, torch.device(device))

    def __call__(
        self,
        layer: int,  # noqa: ARG002  (a cache needs it)
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """-> (N, Hq, D)."""
        window = self._window(window)
        kernel = attention_kernel(q.device, q.dtype, q.shape[-1], softcap)
        if kernel == "packed":
            return _Packed.apply(q, k, v, self.blocks, scale, window, softcap)
        if kernel == "flash":
            return self._flash(q, *(torch.cat(list(map(torch.cat, self._seen(t)))) for t in (k, v)), scale, window)
        if len(self.documents) > 1 and self.max_length * len(self.documents) == q.shape[0] and softcap is None:
            return attend_equal(q, k, v, self.max_length, scale=scale, window=window)
        outputs = [
            attend_document(q[i:j], *map(_joined, seen), scale=scale, window=window, softcap=softcap)
            for (i, j), *seen in zip(pairwise(self.cu_seqlens), self._seen(k), self._seen(v), strict=True)
        ]
        return _joined(outputs)

    def _seen(self, t: Tensor) -> list[list[Tensor]]:
        """Keys or values of each document: its prefix's, where it has one, and its own."""
        return [
            [t[d.prefix : d.prefix + d.before]] * (d.before > 0) + [t[d.key : d.key + d.length]] for d in self.documents
        ]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> tuple[Tensor, Kept]:
        """-> the same (N, Hq, D), and what `backward` wants besides q, k, v and it."""
        if attention_kernel(q.device, q.dtype, q.shape[-1], softcap) == "packed":
            options = dict(scale=scale, window=self._window(window), softcap=softcap)
            return attend_packed(q, k, v, self.blocks, **options)
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_(True) for t in (q, k, v))
            out = self(0, *leaves, scale=scale, window=window, softcap=softcap)
        return out.detach(), Graph(out, leaves)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        kept: Kept,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        into: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Fill `into` with the gradients of q, k and v from that of the output; a graph in `kept` is used up."""
        if isinstance(kept, Graph):
            for target, found in zip(into, torch.autograd.grad(kept.out, kept.leaves, dout), strict=True):
                target.copy_(found)
            return
        options = dict(scale=scale, window=self._window(window), softcap=softcap)
        attend_packed_backward(dout, q, k, v, out, kept, self.blocks, **options, into=into)

    def _window(self, window: int | None) -> int | None:
        return None if window is None or window >= self.max_length else window

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """torch's own variable-length flash kernel, which takes fewer key-value heads as they are."""
        lengths = [d.before + d.length for d in self.documents]
        queries, keys = (
            torch.tensor(e, dtype=torch.int32, device=q.device) for e in (self.cu_seqlens, [0, *accumulate(lengths)])
        )
        left = -1 if window is None else window - 1
        return torch.ops.aten._flash_attention_forward(
            q, k, v, queries, keys, self.max_queries, self.max_length, 0.0, window is None, False,
            scale=scale, window_size_left=left, window_size_right=0,
        )[0]  # fmt: skip


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _documents(
    cu_seqlens: Sequence[int], cu_keys: Sequence[int], prefixes: Sequence[int | None] | None
) -> list[Document]:
    queries, keys = ([(a, b - a) for a, b in pairwise(edges)] for edges in (cu_seqlens, cu_keys))
    found = [Document(q, asking, k, length) for (q, asking), (k, length) in zip(queries, keys, strict=True)]
    assert cu_seqlens[0] == cu_keys[0] == 0 and found, f"{cu_seqlens} must rise from 0"
    assert all(0 < d.asking <= d.length for d in found), f"{queries} queries cannot be the last of {keys} keys"
    for at, index in enumerate(prefixes or ()):
        if index is not None:
            prefix, own = found[index], found[at]
            assert prefix.query + prefix.asking + prefix.behind == own.query, "documents of a prefix stand behind it"
            found[at] = replace(own, prefix=prefix.key, before=prefix.length)
            found[index] = replace(prefix, behind=prefix.behind + own.asking)
    return found


class _Packed(torch.autograd.Function):
    """Our kernels for autograd, which transformers' modules need."""

    @staticmethod
    def forward(ctx, q, k, v, blocks: PackedBlocks, scale: float, window: int | None, softcap: float | None):
        ctx.blocks, ctx.options = blocks, dict(scale=scale, window=window, softcap=softcap)
        q, k, v = (t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in (q, k, v))
        out, lse = attend_packed(q, k, v, blocks, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        into = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        attend_packed_backward(dout.contiguous(), q, k, v, out, lse, ctx.blocks, **ctx.options, into=into)
        return *into, None, None, None, None


@dataclass(frozen=True, eq=False)
class Graph:
    """An attention that autograd recorded, where no kernel with a backward of its own serves."""

    out: Tensor
    leaves: tuple[Tensor, Tensor, Tensor]


Kept = Graph | Tensor  # or the log-sum-exp (Hq, N)


def attention_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None) -> str:
    """The name of what `VarlenCausal` runs: "packed" (our own), or where that is not served "flash" (torch's), "sdpa per
    document" or "capped softmax per document"."""
    half = dtype in KERNEL_DTYPES
    if half and head_dim <= 256 and triton_ready(device.type):
        return "packed"
    if softcap is not None:
        return "capped softmax per document"  # neither of torch's kernels can cap
    flash = half and device.type == "cuda" and head_dim % 8 == 0 and head_dim <= 256
    return "flash" if flash else "sdpa per document"


def attend_document(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """One document: q (L, Hq, D) are its last L positions, k, v (K, Hkv, D) all of them -> (L, Hq, D)."""
    if softcap is not None:
        return _capped(q, k, v, scale=scale, window=window, softcap=softcap)
    queries, keys = q.shape[0], k.shape[0]
    if q.is_cuda and q.shape[1] != k.shape[1]:
        # The memory-efficient CUDA kernel wants equal heads; without it SDPA would build all K x K scores.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if window is not None and window >= keys:
        window = None
    causal = queries == keys > 1 and window is None
    sees_all = queries == 1 and window is None
    mask = None if causal or sees_all else _band(queries, keys, window, q.device)
    out = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def attend_equal(q: Tensor, k: Tensor, v: Tensor, length: int, *, scale: float, window: int | None) -> Tensor:
    """Packed documents of one `length` in one call; the same per document as `attend_document`."""
    documents = (t.view(-1, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        *documents,
        attn_mask=None if window is None else _band(length, length, window, q.device),
        is_causal=window is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).reshape(q.shape)


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(L, K), True where query i (at position K - L + i) sees key j: i - window < j <= i."""
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(keys, device=device)[None]
    return j <= i if window is None else (j <= i) & (j > i - window)


def _capped(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float) -> Tensor:
    """Soft-capped scores (Gemma 2, arXiv 2408.00118), a block of queries at a time so that memory stays linear."""
    queries, keys = q.shape[0], k.shape[0]
    block = partial(_capped_block, scale=scale, window=window, softcap=softcap)
    if queries <= QUERY_BLOCK:
        return block(q, k, v)
    outputs = []
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        end = keys - queries + stop  # keys up to the block's last position
        begin = 0 if window is None else max(0, end - (stop - start) - window + 1)
        args = (q[start:stop], k[begin:end], v[begin:end])
        outputs.append(
            checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else block(*args)
        )
    return torch.cat(outputs)


def _capped_block(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, softcap: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)).to(wide) * scale  # (Hq, L, K)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_band(q.shape[0], k.shape[1], window, q.device), -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1)


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, over the whole (N, N): softmax(cap(scale q k^T) + mask) v. Kernels are tested against it."""
    lengths = torch.tensor([stop - start for start, stop in pairwise(cu_seqlens)])
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(q.device)
    at = torch.arange(q.shape[0], device=q.device)
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if window is not None:
        seen &= at[:, None] - at < window
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, dim=1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(group, dim=1))


def register() -> None:
    """Offer our attention to transformers models as `attn_implementation="local_tinker"`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, transformers_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, no_mask)


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """Our attention masks by itself; it must not be handed padding to mask."""
    if attention_mask is not None:
        raise ModelError(
            "padded rows were given; local_tinker attention takes whole or packed documents, without a mask"
        )


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    attend: Attend | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, Hq, L, D), key, value (B, Hkv, K, D) -> (B, L, Hq, D).

    With `attend`, given to the model's forward by keyword, the row is a pack and `attend` sees it. Without, every row
    is one document of which the last L positions ask (a cache holds the others).

    Raises:
        ModelError: sinks, dropout, a mask or bidirectional attention, none of which is implemented here.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = {
        "attention sinks": s_aux is not None,
        "attention dropout": dropout > 0,
        "a mask": attention_mask is not None,
    }
    asked["bidirectional attention"] = not causal
    for what, wanted in asked.items():
        if wanted:
            raise ModelError(f"{type(module).__name__} asks for {what}, which local_tinker attention does not do")
    options = dict(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling, window=sliding_window, softcap=softcap
    )
    rows = [tuple(t[row].transpose(0, 1) for t in (query, key, value)) for row in range(query.shape[0])]
    if attend is None:
        return torch.stack([attend_document(*row, **options) for row in rows]), None
    if len(rows) != 1:
        raise ModelError(f"got {len(rows)} rows with attend=; a pack is one row")
    return attend(module.layer_idx, *rows[0], **options)[None], None
