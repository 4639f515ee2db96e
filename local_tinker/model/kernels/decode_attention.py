"""Attention of decoding rows over a paged cache, where a prompt that several rows share is read once for all of them.

A row's keys stand in two places: a prefix that it may share (the prompt of its group) and pages of its own. Both are
lists of pages. The kernel walks them in splits of a fixed number of tokens (flash decoding), each split of a prefix for
all its readers together, and a second kernel puts a row's splits together where there is more than one.

A page holds PAGE tokens of all key heads, head by head: the kernel's tile of keys is one page of one head, 16 KiB in a
row at D = 128 in bf16.

Shapes: B rows, S prefixes, W readers of a prefix, Hq query heads, Hkv key heads, G = Hq / Hkv, D head width, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import jit, power_of_two, tl, triton_ready
from .dependent import dependent, follow
from .paged import PIECE, PagedRows, StepPlaces

_LOG2E = 1.4426950408889634


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q (B, Hq, D), keys and values (pages, Hkv, PAGE, D) -> (B, Hq * D). This step's key is stored already."""
    if kernel_serves(q, softcap):
        return _attend_triton(q, keys, values, rows, scale, window, softcap)
    return decode_attention_reference(q, keys, values, rows, scale=scale, window=window, softcap=softcap)


def kernel_serves(q: Tensor, softcap: float | None) -> bool:
    del softcap
    return triton_ready(q.device.type) and q.dtype != torch.float64 and 16 <= q.shape[-1] <= 256


def decode_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition in torch operations, fp32 inside."""
    if rows.step is not None and rows.prefix_pages is None and window is None and softcap is None:
        return _attend_own(q, keys, values, rows.step, scale)
    position = rows.prefix_length + rows.own_length - 1  # (B,)
    first = None if window is None else position - window + 1  # the first visible position
    own_first = None if first is None else (first - rows.prefix_length)[:, None]
    own = _partial(
        q[:, None], keys, values, rows.own_pages, rows.own_length[:, None], own_first, scale=scale, softcap=softcap
    )
    if rows.prefix_pages is None:
        out = own[0] / own[2].clamp_min(1e-38)[..., None]
        return out.to(q.dtype).view(q.shape[0], -1)
    readers = rows.readers.long()
    seen = torch.where(readers < 0, 0, rows.prefix_length[readers.clamp_min(0)])  # (S, W)
    shared_first = None if first is None else first[readers.clamp_min(0)]
    shared = _partial(
        q[readers.clamp_min(0)], keys, values, rows.prefix_pages, seen, shared_first, scale=scale, softcap=softcap
    )
    # Rows without a reader's place get nothing from a prefix: they scatter into a row past the end.
    places = torch.where(readers < 0, q.shape[0], readers).flatten()
    parts = []
    for whole, empty in zip(shared, (0.0, -torch.inf, 0.0), strict=True):
        flat = whole.view(places.shape[0], *whole.shape[1:])
        parts.append(flat.new_full((q.shape[0] + 1, *flat.shape[1:]), empty).index_copy_(0, places, flat)[:-1])
    out = _merge(own, tuple(parts))
    return out.to(q.dtype).view(q.shape[0], -1)


def _attend_own(q: Tensor, keys: Tensor, values: Tensor, step: StepPlaces, scale: float) -> Tensor:
    """Rows without a shared prompt: one copy of their tokens, one call of torch's attention."""
    count, heads, width = q.shape
    shared = keys.shape[1]
    k, v = (
        cache.view(-1, PIECE * width).index_select(0, step.own).view(count, shared, -1, width)
        for cache in (keys, values)
    )
    grouped = q.view(count, shared, heads // shared, width)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=step.seen, scale=scale).reshape(count, -1)


def _partial(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    length: Tensor,
    first: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (S, W, Hq, D) over pages (S, P), tokens first..length-1 of each reader (S, W) -> unnormalised outputs
    (S * W, Hq, D), the largest score and the sum of weights (S * W, Hq), fp32 or wider."""
    segments, readers, heads, width = q.shape
    shared, page, count = keys.shape[1], keys.shape[2], pages.shape[1]
    group = heads // shared
    wide = torch.promote_types(q.dtype, torch.float32)
    flat = pages.flatten().long()
    k, v = (cache.index_select(0, flat).to(wide).view(segments, count, shared, page, width) for cache in (keys, values))
    lined = (
        q.to(wide).view(segments, readers, shared, group, width).transpose(1, 2).reshape(segments, 1, shared, -1, width)
    )
    scores = (lined * scale) @ k.transpose(-1, -2)  # (S, P, Hkv, W * G, PAGE)
    scores = scores.permute(0, 2, 3, 1, 4).reshape(segments, shared, readers, group, count * page)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(count * page, device=q.device)
    hidden = at >= length[..., None]  # (S, W, T)
    if first is not None:
        hidden = hidden | (at < first[..., None])
    scores = scores.masked_fill(hidden[:, None, :, None], -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    weights = (scores - top).exp()
    total = weights.sum(-1)
    weights = weights.view(segments, shared, readers * group, count, page).permute(0, 3, 1, 2, 4)
    out = (weights @ v).sum(1) if count > 1 else (weights @ v)[:, 0]  # (S, Hkv, W * G, D)
    out = out.view(segments, shared, readers, group, width).transpose(1, 2).reshape(-1, heads, width)
    return out, *(t.transpose(1, 2).reshape(-1, heads) for t in (top[..., 0], total))


def _merge(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Attention over two key sets from unnormalised parts; the first always holds the row's own key."""
    top = torch.maximum(one[1], other[1])
    a, b = (one[1] - top).exp(), (other[1] - top).exp()
    total = (one[2] * a + other[2] * b)[..., None]
    return (one[0] * a[..., None] + other[0] * b[..., None]) / total


@dataclass(frozen=True)
class Tile:
    """How a program walks the pages: tokens at a time, warps, loads in flight."""

    own_tokens: int
    prefix_tokens: int
    warps: int
    stages: int


def tile_for(width: int, dtype: torch.dtype) -> Tile:
    """Two tiles in flight and several programs on a processor: these hide each other's waiting better than deep
    pipelines do. Measured on an H100: within 5 % of the best of nine for every batch and context tried."""
    key = width * dtype.itemsize  # bytes
    if key > 512:
        return Tile(16, 16, 4, 2)
    return Tile(64, 64, 4, 2) if key <= 256 else Tile(32, 32, 4, 2)


def _attend_triton(
    q: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    count, heads, width = q.shape
    shared = keys.shape[1]
    group = heads // shared
    own_splits, prefix_splits = rows.own_splits, rows.prefix_splits
    splits = own_splits + prefix_splits
    whole = splits == 1 and not rows.fixed
    out = torch.empty(count, heads * width, dtype=q.dtype, device=q.device)
    parts = 0 if whole else count * heads * splits
    partial = out if whole else torch.empty(parts, width, dtype=torch.float32, device=q.device)
    stats = out if whole else torch.empty(2, parts, dtype=torch.float32, device=q.device)
    readers = 1 if rows.readers is None else rows.readers.shape[1]
    prefixes = 0 if rows.prefix_pages is None else rows.prefix_pages.shape[0]
    prefix_pages = rows.own_pages if rows.prefix_pages is None else rows.prefix_pages
    common = dict(HEADS=heads, D=width, DP=power_of_two(width, 16), **dependent(q.device.type))
    tile = tile_for(width, q.dtype)
    # Prefixes first: their programs are the longest.
    _attend_splits[(prefixes * prefix_splits + count * own_splits, shared)](
        q, keys, values, rows.own_pages, rows.own_length, rows.prefix_length, prefix_pages,
        rows.own_pages if rows.readers is None else rows.readers, partial, stats, out, keys.stride(0),
        rows.own_pages.stride(0), prefix_pages.stride(0), parts, scale * _LOG2E, softcap or 0.0, window or 0, prefixes,
        prefix_splits, own_splits, rows.prefix_split, rows.own_split, READERS=readers,
        BM_PREFIX=power_of_two(readers * group, 16), BM_OWN=power_of_two(group, 16), PAGE=keys.shape[2],
        BN_PREFIX=tile.prefix_tokens, BN_OWN=tile.own_tokens, GROUP=group, WINDOW=window is not None,
        CAP=softcap is not None, WHOLE=whole, num_warps=tile.warps, num_stages=tile.stages, **common,
    )  # fmt: skip
    if not whole:
        lines = 4 if splits <= 8 else 1
        _combine[(-(-count * heads // lines),)](
            partial, stats, out, rows.own_length, rows.prefix_length, count * heads, prefix_splits, own_splits,
            rows.prefix_split, rows.own_split, LINES=lines, SPLITS=power_of_two(splits, 2), FIXED=rows.fixed,
            num_warps=4, **common,
        )  # fmt: skip
    return out


@jit
def _attend_tile(
    q, K, V, pages, lo, hi, first, page_stride, scale_log2, softcap, WINDOW: tl.constexpr, CAP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q (BM, DP) over tokens lo..hi-1 of one list of pages -> unnormalised output, largest score (base 2), sum."""
    d = tl.arange(0, DP)
    n = tl.arange(0, BN)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for start in range(lo, hi, BN):
        page = tl.load(pages + start // PAGE).to(tl.int64)
        token = start + n
        inside = token < hi
        at = page * page_stride + (start % PAGE + n) * D
        if D == DP:
            k = tl.load(K + at[None, :] + d[:, None], mask=inside[None, :], other=0.0)
        else:
            k = tl.load(K + at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        x = tl.dot(q, k, input_precision="ieee")
        if CAP:
            z = x * (scale_log2 / 1.4426950408889634) / softcap
            x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)) * 1.4426950408889634
        else:
            x = x * scale_log2
        x = tl.where(inside[None, :], x, -float("inf"))
        if WINDOW:
            x = tl.where(token[None, :] >= first[:, None], x, -float("inf"))
        new = tl.maximum(top, tl.max(x, 1))
        if WINDOW:
            safe = tl.where(new == -float("inf"), 0.0, new)
        else:
            safe = new
        shrink = tl.exp2(top - safe)
        p = tl.exp2(x - safe[:, None])
        total = total * shrink + tl.sum(p, 1)
        if D == DP:
            v = tl.load(V + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
        else:
            v = tl.load(V + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    return acc, top, total


@jit
def _prefix_split(
    Q, K, V, PAGES, READERS_OF, OWN_LENGTH, PREFIX_LENGTH, PARTIAL, STATS, segment, split, head, splits, page_stride,
    pages_stride, plane, scale_log2, softcap, window, SPLIT, READERS: tl.constexpr, BM: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One split of one prefix for all its readers."""
    r = tl.arange(0, BM)
    row = tl.load(READERS_OF + segment * READERS + r // GROUP, mask=r < READERS * GROUP, other=-1).to(tl.int64)
    ok = row >= 0
    seen = tl.load(PREFIX_LENGTH + row, mask=ok, other=0)
    lo = split * SPLIT
    hi = tl.minimum(lo + SPLIT, tl.max(seen, 0))
    follow(DEPENDENT)
    if lo < hi:
        first = seen
        if WINDOW:
            first = seen + tl.load(OWN_LENGTH + row, mask=ok, other=0) - window
        line = row * HEADS + head * GROUP + r % GROUP
        _attend_lines(
            Q, K, V, PAGES + segment * pages_stride, PARTIAL, STATS, PARTIAL, line, ok, lo, hi, first, splits, split,
            page_stride, plane, scale_log2, softcap, WINDOW, CAP, D, DP, PAGE, BM, BN, False,
        )  # fmt: skip


@jit
def _own_split(
    Q, K, V, PAGES, OWN_LENGTH, PARTIAL, STATS, OUT, row, split, head, splits, prefix_splits, page_stride, pages_stride,
    plane, scale_log2, softcap, window, SPLIT, BM: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    WHOLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One split of one row's own tokens."""
    r = tl.arange(0, BM)
    length = tl.load(OWN_LENGTH + row)
    lo = split * SPLIT
    hi = tl.minimum(lo + SPLIT, length)
    follow(DEPENDENT)
    if lo < hi:
        first = r * 0 + (length - window)
        line = row * HEADS + head * GROUP + r
        _attend_lines(
            Q, K, V, PAGES + row * pages_stride, PARTIAL, STATS, OUT, line, r < GROUP, lo, hi, first, splits,
            prefix_splits + split, page_stride, plane, scale_log2, softcap, WINDOW, CAP, D, DP, PAGE, BM, BN, WHOLE,
        )  # fmt: skip


@jit
def _attend_lines(
    Q, K, V, pages, PARTIAL, STATS, OUT, line, ok, lo, hi, first, splits, at_split, page_stride, plane, scale_log2,
    softcap, WINDOW: tl.constexpr, CAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The query lines (BM,) over tokens lo..hi-1 of a list of pages, stored as one split's partial result, or as the
    result where these are WHOLE rows."""
    d = tl.arange(0, DP)
    shown = ok[:, None] & (d < D)[None, :]
    q = tl.load(Q + line[:, None] * D + d[None, :], mask=shown, other=0.0)
    acc, top, total = _attend_tile(
        q, K, V, pages, lo, hi, first, page_stride, scale_log2, softcap, WINDOW, CAP, D, DP, PAGE, BM, BN
    )
    if WHOLE:
        tl.store(OUT + line[:, None] * D + d[None, :], (acc / total[:, None]).to(OUT.dtype.element_ty), mask=shown)
    else:
        at = line * splits + at_split
        tl.store(PARTIAL + at[:, None] * D + d[None, :], acc, mask=shown)
        tl.store(STATS + at, top, mask=ok)
        tl.store(STATS + plane + at, total, mask=ok)


@jit
def _attend_splits(
    Q, K, V, OWN_PAGES, OWN_LENGTH, PREFIX_LENGTH, PREFIX_PAGES, READERS_OF, PARTIAL, STATS, OUT, page_stride,
    own_stride, prefix_stride, plane, scale_log2, softcap, window, prefixes, prefix_splits, own_splits, PREFIX_SPLIT,
    OWN_SPLIT, READERS: tl.constexpr, BM_PREFIX: tl.constexpr, BM_OWN: tl.constexpr, PAGE: tl.constexpr,
    BN_PREFIX: tl.constexpr, BN_OWN: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, WHOLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Programs of the prefixes' splits first, then of the rows' own; axis 1 is the key head. WHOLE: one split is all."""
    pid = tl.program_id(0)
    head = tl.program_id(1)
    splits = prefix_splits + own_splits
    offset = (head * PAGE * D).to(tl.int64)
    if pid < prefixes * prefix_splits:
        _prefix_split(
            Q, K + offset, V + offset, PREFIX_PAGES, READERS_OF, OWN_LENGTH, PREFIX_LENGTH, PARTIAL, STATS,
            (pid // prefix_splits).to(tl.int64), pid % prefix_splits, head, splits, page_stride, prefix_stride, plane,
            scale_log2, softcap, window, PREFIX_SPLIT, READERS, BM_PREFIX, PAGE, BN_PREFIX, HEADS, GROUP, D, DP, WINDOW, CAP, DEPENDENT,
        )  # fmt: skip
    else:
        rest = pid - prefixes * prefix_splits
        _own_split(
            Q, K + offset, V + offset, OWN_PAGES, OWN_LENGTH, PARTIAL, STATS, OUT, (rest // own_splits).to(tl.int64),
            rest % own_splits, head, splits, prefix_splits, page_stride, own_stride, plane, scale_log2, softcap, window,
            OWN_SPLIT, BM_OWN, PAGE, BN_OWN, HEADS, GROUP, D, DP, WINDOW, CAP, WHOLE, DEPENDENT,
        )  # fmt: skip


@jit
def _combine(
    PARTIAL, STATS, OUT, OWN_LENGTH, PREFIX_LENGTH, count, prefix_splits, own_splits, PREFIX_SPLIT, OWN_SPLIT,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LINES: tl.constexpr, SPLITS: tl.constexpr,
    FIXED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """LINES of the `count` heads of all rows."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    there = line < count
    row = line // HEADS
    s = tl.arange(0, SPLITS)[None, :]
    d = tl.arange(0, DP)
    splits = prefix_splits + own_splits
    plane = count * splits
    prefix_length = tl.load(PREFIX_LENGTH + row, mask=there, other=0)[:, None]
    own_length = tl.load(OWN_LENGTH + row, mask=there, other=1)[:, None]
    ok = (s < splits) & tl.where(
        s < prefix_splits, s * PREFIX_SPLIT < prefix_length, (s - prefix_splits) * OWN_SPLIT < own_length
    )
    ok = ok & there[:, None]
    at = line[:, None] * splits + s
    follow(DEPENDENT)
    top = tl.load(STATS + at, mask=ok, other=-float("inf"))
    peak = tl.max(top, 1)[:, None]
    sums = tl.load(STATS + plane + at, mask=ok, other=0.0)
    weight = tl.where(sums > 0, tl.exp2(top - peak), 0.0)
    if FIXED:
        out = tl.zeros([LINES, DP], tl.float32)
        total = tl.zeros([LINES], tl.float32)
        for i in range(splits):
            one = tl.sum(tl.where(s == i, weight, 0.0), 1)[:, None]
            some = (one > 0) & (d < D)[None, :]
            part = tl.load(PARTIAL + (line[:, None] * splits + i) * D + d[None, :], mask=some, other=0.0)
            out += tl.where(one > 0, one * part, 0.0)
            total += tl.sum(tl.where(s == i, sums * weight, 0.0), 1)
    else:
        part = tl.load(
            PARTIAL + at[:, :, None] * D + d[None, None, :],
            mask=(ok & (sums > 0))[:, :, None] & (d < D)[None, None, :],
            other=0.0,
        )
        out = tl.sum(part * weight[:, :, None], 1)
        total = tl.sum(sums * weight, 1)
    shown = there[:, None] & (d < D)[None, :]
    tl.store(OUT + line[:, None] * D + d[None, :], (out / total[:, None]).to(OUT.dtype.element_ty), mask=shown)
