"""The small steps between the matrix products of a decoding step: residual + norm, rotary + cache write, gated MLP. Those
that read a product take its low-rank part along, see `low_rank`. Rounding points are those of `model.layer`.

Shapes: B rows, H hidden, R rank (padded to 16 or more), F intermediate, Hq / Hkv heads, D head width, J
rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import jit, power_of_two, tl, triton_ready
from .dependent import dependent, follow
from .low_rank import LowRank, load_up, low_rank_tile, tile_of
from .norm import rms_norm
from .paged import PagedRows, write_places
from .rope import rotate
from .swiglu import ACTIVATIONS

NORMS = {"round_then_scale": 0, "scale_then_round": 1, "one_plus": 2}
GATES = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def add_norm(
    x: Tensor,
    residual: Tensor,
    after: Tensor | None,
    before: Tensor | None,
    *,
    eps: float,
    kind: str,
) -> Tensor:
    """residual += norm(x; after) in place, then norm(residual; before) (B, H). A weight of None leaves its norm out."""
    if triton_ready(residual.device.type) and residual.dtype != torch.float64:
        return _add_norm_triton(x, residual, after, before, eps, kind)
    return add_norm_reference(x, residual, after, before, eps=eps, kind=kind)


def add_norm_reference(x, residual, after, before, *, eps, kind):
    """`add_norm` in torch operations."""
    residual += x if after is None else rms_norm(x, after, eps, kind)
    return residual if before is None else rms_norm(residual, before, eps, kind)


def _add_norm_triton(x, residual, after, before, eps, kind):
    rows, hidden = residual.shape
    out = torch.empty_like(residual)
    _add_norm[(rows,)](
        x, residual, residual if after is None else after, residual if before is None else before, out, hidden, eps,
        x.stride(0), AFTER=after is not None, BEFORE=before is not None, KIND=NORMS[kind], BLOCK=power_of_two(hidden),
        num_warps=8 if hidden >= 2048 else 4, **dependent(out.device.type),
    )  # fmt: skip
    return out


@jit
def scaled_norm(f, w, hidden, eps, KIND: tl.constexpr, TYPE: tl.constexpr):
    """RMSNorm of f (BLOCK,) fp32 with the weights w."""
    w = w.to(tl.float32)
    n = f * tl.rsqrt(tl.sum(f * f, axis=0) / hidden + eps)
    if KIND == 0:
        n = n.to(TYPE).to(tl.float32) * w
    elif KIND == 1:
        n = n * w
    else:
        n = n * (1.0 + w)
    return n.to(TYPE)


@jit
def _add_norm(
    X, RESIDUAL, AFTER_W, BEFORE_W, OUT, hidden, eps, x_stride, AFTER: tl.constexpr, BEFORE: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < hidden
    kind: tl.constexpr = RESIDUAL.dtype.element_ty
    if AFTER:
        after = tl.load(AFTER_W + c, mask=inside, other=0.0)
    if BEFORE:
        before = tl.load(BEFORE_W + c, mask=inside, other=0.0)
    follow(DEPENDENT)
    r = tl.load(RESIDUAL + row * hidden + c, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(X + row * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    if AFTER:
        x = scaled_norm(x, after, hidden, eps, KIND, kind).to(tl.float32)
    r = (r + x).to(kind)
    tl.store(RESIDUAL + row * hidden + c, r, mask=inside)
    if BEFORE:
        r = scaled_norm(r.to(tl.float32), before, hidden, eps, KIND, kind)
    tl.store(OUT + row * hidden + c, r, mask=inside)


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMSNorm over each query and key head before the rotation (D,)."""

    q: Tensor
    k: Tensor
    eps: float
    kind: str


def rope_write(
    y: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    *,
    heads: int,
    low_rank: LowRank | None = None,
    norms: HeadNorms | None = None,
) -> Tensor:
    """The packed projection y (B, >= (Hq + 2 Hkv) D) -> rotated queries (B, Hq, D); keys and values go to their page.

    Args:
        angles: cos and sin (B, J), or None for a layer without rotation. keys, values: (pages, Hkv, PAGE, D).
        rows: `own_length` counts this step's token already, which is stored at the last place.
    """
    width = keys.shape[-1]
    whole = angles is None or angles[0].shape[-1] * 2 == width
    if triton_ready(y.device.type) and y.dtype != torch.float64 and whole and width == power_of_two(width, 16):
        return _rope_write_triton(y, angles, keys, values, rows, heads, low_rank, norms)
    return rope_write_reference(y, angles, keys, values, rows, heads=heads, low_rank=low_rank, norms=norms)


def rope_write_reference(y, angles, keys, values, rows, *, heads, low_rank=None, norms=None):
    """`rope_write` in torch operations."""
    width = keys.shape[-1]
    shared = keys.shape[1]
    y = y[:, : (heads + 2 * shared) * width]
    if low_rank is not None:
        y = low_rank.add_to(y)
    y = y.view(y.shape[0], -1, width) if y.is_contiguous() else y.reshape(y.shape[0], -1, width)
    if norms is not None:
        q, k = (
            rms_norm(y[:, cut], weight, norms.eps, norms.kind)
            for cut, weight in ((slice(heads), norms.q), (slice(heads, heads + shared), norms.k))
        )
        turned = torch.cat([q, k], 1)
    else:
        turned = y[:, : heads + shared]
    if angles is not None:
        turned = rotate(turned, angles[0][:, None], angles[1][:, None])
    places = rows.step.write if rows.step is not None else write_places(rows, keys)
    for cache, new in ((keys, turned[:, heads:]), (values, y[:, heads + shared :])):
        cache.view(-1, width).index_copy_(0, places, new.reshape(-1, width))
    return turned[:, :heads]


def _rope_write_triton(y, angles, keys, values, rows, heads, low_rank, norms):
    count, width, shared = y.shape[0], keys.shape[-1], keys.shape[1]
    out = torch.empty(count, heads, width, dtype=y.dtype, device=y.device)
    parts = 0 if low_rank is None else len(low_rank.edges) - 1
    cos, sin = (y, y) if angles is None else angles
    _rope_write[(-(-count // 16), heads + 2 * shared)](
        y, y if low_rank is None else low_rank.thin, y if low_rank is None else low_rank.up,
        y if norms is None else norms.q, y if norms is None else norms.k, cos, sin, out, keys, values, rows.own_pages,
        rows.own_length, count, y.stride(0), 0 if low_rank is None else low_rank.thin.stride(0), cos.stride(0),
        rows.own_pages.stride(0), keys.stride(0), 0.0 if low_rank is None else low_rank.scale,
        0.0 if norms is None else norms.eps, HEADS=heads, SHARED=shared, HALF=width // 2,
        RANK=16 if low_rank is None else low_rank.up.shape[1], PARTS=parts,
        NORM=-1 if norms is None else NORMS[norms.kind], ROTATE=angles is not None, PAGE=keys.shape[2], BM=16,
        num_warps=4, **dependent(out.device.type),
    )  # fmt: skip
    return out


@jit
def _norm_halves(a, b, weight, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """RMSNorm of heads from their halves (BM, HALF)."""
    kind: tl.constexpr = a.dtype
    c = tl.arange(0, HALF)
    fa = a.to(tl.float32)
    fb = b.to(tl.float32)
    inverse = tl.rsqrt((tl.sum(fa * fa, 1) + tl.sum(fb * fb, 1)) / (2 * HALF) + eps)[:, None]
    wa = tl.load(weight + c).to(tl.float32)[None, :]
    wb = tl.load(weight + HALF + c).to(tl.float32)[None, :]
    if NORM == 0:
        a = ((fa * inverse).to(kind).to(tl.float32) * wa).to(kind)
        b = ((fb * inverse).to(kind).to(tl.float32) * wb).to(kind)
    else:
        if NORM == 2:
            wa += 1.0
            wb += 1.0
        a = (fa * inverse * wa).to(kind)
        b = (fb * inverse * wb).to(kind)
    return a, b


@jit
def _turn_halves(a, b, cos, sin):
    """Heads rotated, from their halves (BM, HALF); each product is rounded to the angles' type."""
    kind: tl.constexpr = a.dtype
    step: tl.constexpr = cos.dtype
    fa = a.to(tl.float32)
    fb = b.to(tl.float32)
    cos = cos.to(tl.float32)
    sin = sin.to(tl.float32)
    first = ((fa * cos).to(step).to(tl.float32) - (fb * sin).to(step).to(tl.float32)).to(kind)
    second = ((fb * cos).to(step).to(tl.float32) + (fa * sin).to(step).to(tl.float32)).to(kind)
    return first, second


@jit
def _rope_write(
    Y, THIN, UP, Q_NORM, K_NORM, COS, SIN, OUT, KEYS, VALUES, PAGES, LENGTH, rows, y_stride, thin_stride,
    angle_stride, pages_stride, page_stride, scale, eps, HEADS: tl.constexpr, SHARED: tl.constexpr,
    HALF: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
    PAGE: tl.constexpr, BM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    kind: tl.constexpr = OUT.dtype.element_ty
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    head = tl.program_id(1)
    ok = row < rows
    c = tl.arange(0, HALF)
    mask = ok[:, None] & (c < HALF)[None, :]
    last = tl.maximum(tl.load(LENGTH + row, mask=ok, other=1) - 1, 0)
    if PARTS > 0:
        up = UP + (head * D + c) * RANK
        up_a = load_up(up, RANK)
        up_b = load_up(up + HALF * RANK, RANK)
    follow(DEPENDENT)
    at = row[:, None] * y_stride + head * D + c[None, :]
    a = tl.load(Y + at, mask=mask, other=0.0)
    b = tl.load(Y + at + HALF, mask=mask, other=0.0)
    if PARTS > 0:
        part = tl.where(head < HEADS, 0, tl.where(head < HEADS + SHARED, 1, 2)) if PARTS == 3 else 0
        thin = THIN + row[:, None] * thin_stride + part * RANK
        a = (a.to(tl.float32) + scale * low_rank_tile(thin, up_a, ok, RANK)).to(kind)
        b = (b.to(tl.float32) + scale * low_rank_tile(thin, up_b, ok, RANK)).to(kind)
    if NORM >= 0 and head < HEADS + SHARED:
        weight = Q_NORM
        if head >= HEADS:
            weight = K_NORM
        a, b = _norm_halves(a, b, weight, eps, HALF, NORM)
    if ROTATE and head < HEADS + SHARED:
        angle = row[:, None] * angle_stride + c[None, :]
        cos = tl.load(COS + angle, mask=mask, other=0.0)
        sin = tl.load(SIN + angle, mask=mask, other=0.0)
        a, b = _turn_halves(a, b, cos, sin)
    if head < HEADS:
        to = OUT + row[:, None] * (HEADS * D) + head * D + c[None, :]
        tl.store(to, a, mask=mask)
        tl.store(to + HALF, b, mask=mask)
    else:
        page = tl.load(PAGES + row * pages_stride + last // PAGE, mask=ok, other=0).to(tl.int64)
        place = page[:, None] * page_stride + (last % PAGE)[:, None] * D + c[None, :]
        if head < HEADS + SHARED:
            key = KEYS + place + (head - HEADS) * PAGE * D
            tl.store(key, a, mask=mask)
            tl.store(key + HALF, b, mask=mask)
        else:
            value = VALUES + place + (head - HEADS - SHARED) * PAGE * D
            tl.store(value, a, mask=mask)
            tl.store(value + HALF, b, mask=mask)


def gated_product(y: Tensor, size: int, activation: str, *, low_rank: LowRank | None = None) -> Tensor:
    """The packed gate and up y (B, >= 2 F) -> act(gate) * up (B, F), `size` being F."""
    if triton_ready(y.device.type) and y.dtype != torch.float64:
        return _gated_triton(y, size, activation, low_rank)
    return gated_reference(y, size, activation, low_rank=low_rank)


def gated_reference(y, size, activation, *, low_rank=None):
    """`gated_product` in torch operations."""
    y = y[:, : 2 * size]
    if low_rank is not None:
        y = low_rank.add_to(y)
    return ACTIVATIONS[activation][0](y[:, :size]) * y[:, size:]


def _gated_triton(y, size, activation, low_rank):
    count = y.shape[0]
    out = torch.empty(count, size, dtype=y.dtype, device=y.device)
    bm, bn, warps = (1, 1024, 4) if low_rank is None else (16, 64, 8) if count <= 64 else (64, 64, 8)
    _gated[(-(-count // bm), -(-size // bn))](
        y, y if low_rank is None else low_rank.thin, y if low_rank is None else low_rank.up, out, count, size,
        y.stride(0), 0 if low_rank is None else low_rank.thin.stride(0), 0.0 if low_rank is None else low_rank.scale,
        RANK=16 if low_rank is None else low_rank.up.shape[1],
        PARTS=0 if low_rank is None else len(low_rank.edges) - 1, GATE=GATES[activation], BM=bm, BN=bn, num_warps=warps,
        **dependent(out.device.type),
    )  # fmt: skip
    return out


@jit
def _gated(
    Y, THIN, UP, OUT, rows, size, y_stride, thin_stride, scale, RANK: tl.constexpr, PARTS: tl.constexpr,
    GATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = OUT.dtype.element_ty
    row, c, ok, mask = tile_of(rows, size, BM, BN)
    if PARTS > 0:
        line = tl.minimum(c, size - 1)
        up_gate = load_up(UP + line * RANK, RANK)
        up_up = load_up(UP + (size + line) * RANK, RANK)
    follow(DEPENDENT)
    at = row[:, None] * y_stride + c[None, :]
    gate = tl.load(Y + at, mask=mask, other=0.0)
    up = tl.load(Y + at + size, mask=mask, other=0.0)
    if PARTS > 0:
        thin = THIN + row[:, None] * thin_stride
        gate = (gate.to(tl.float32) + scale * low_rank_tile(thin, up_gate, ok, RANK)).to(kind)
        second = thin + (RANK if PARTS == 2 else 0)
        up = (up.to(tl.float32) + scale * low_rank_tile(second, up_up, ok, RANK)).to(kind)
    g = gate.to(tl.float32)
    if GATE == 0:
        g = g / (1.0 + tl.exp(-g))
    elif GATE == 1:
        z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        g = g * (1.0 - 1.0 / (tl.exp(2.0 * z) + 1.0))  # g / 2 * (1 + tanh z)
    else:
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    tl.store(
        OUT + row[:, None] * size + c[None, :], (g.to(kind).to(tl.float32) * up.to(tl.float32)).to(kind), mask=mask
    )
