"""What a decoding step begins with: the rows' embeddings with the first norm, and the angles of their positions.

Shapes: B rows, H hidden, V vocabulary, J rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import jit, power_of_two, tl, triton_ready
from .decode_step import NORMS, scaled_norm
from .dependent import dependent, follow
from .norm import rms_norm


def embed(tokens: Tensor, embedding: Tensor, factor: float | None) -> Tensor:
    """tokens (...,), embedding (V, H) -> (..., H), times `factor`."""
    h = F.embedding(tokens, embedding)
    return h if factor is None else h * factor


def embed_norm(
    tokens: Tensor, embedding: Tensor, factor: float | None, before: Tensor | None, *, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    """tokens (B,) int64, embedding (V, H) -> the residual (B, H), times `factor`, and norm(residual; before) (B, H); with
    a weight of None the residual itself."""
    if triton_ready(embedding.device.type) and embedding.dtype != torch.float64:
        return _embed_norm_triton(tokens, embedding, factor, before, eps, kind)
    return embed_norm_reference(tokens, embedding, factor, before, eps=eps, kind=kind)


def embed_norm_reference(tokens, embedding, factor, before, *, eps, kind):
    """`embed_norm` in torch operations."""
    residual = embed(tokens, embedding, factor)
    return residual, residual if before is None else rms_norm(residual, before, eps, kind)


def _embed_norm_triton(tokens, embedding, factor, before, eps, kind):
    rows, hidden = tokens.shape[0], embedding.shape[1]
    residual = torch.empty(rows, hidden, dtype=embedding.dtype, device=embedding.device)
    out = residual if before is None else torch.empty_like(residual)
    _embed_norm[(rows,)](
        tokens, embedding, residual if before is None else before, residual, out, embedding.stride(0), hidden, eps,
        1.0 if factor is None else factor,
        SCALED=factor is not None, BEFORE=before is not None, KIND=NORMS[kind], BLOCK=power_of_two(hidden),
        num_warps=8 if hidden >= 2048 else 4, **dependent(out.device.type),
    )  # fmt: skip
    return residual, out


@jit
def _embed_norm(
    TOKENS, EMBEDDING, BEFORE_W, RESIDUAL, OUT, stride, hidden, eps, factor, SCALED: tl.constexpr, BEFORE: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < hidden
    if BEFORE:
        before = tl.load(BEFORE_W + c, mask=inside, other=0.0)
    follow(DEPENDENT)
    kind: tl.constexpr = RESIDUAL.dtype.element_ty
    r = tl.load(EMBEDDING + tl.load(TOKENS + row) * stride + c, mask=inside, other=0.0)
    if SCALED:
        r = (r.to(tl.float32) * factor).to(kind)
    tl.store(RESIDUAL + row * hidden + c, r, mask=inside)
    if BEFORE:
        n = scaled_norm(r.to(tl.float32), before, hidden, eps, KIND, kind)
        tl.store(OUT + row * hidden + c, n, mask=inside)


def turn_angles(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (B,) int64, inv_freq (J,) fp32 -> cos and sin of their products (B, J), times `scaling`."""
    if triton_ready(positions.device.type):
        return _turn_angles_triton(positions, inv_freq, scaling, dtype)
    return turn_angles_reference(positions, inv_freq, scaling, dtype)


def turn_angles_reference(positions, inv_freq, scaling, dtype):
    """`turn_angles` in torch operations."""
    turns = positions[:, None].float() * inv_freq
    return (turns.cos() * scaling).to(dtype), (turns.sin() * scaling).to(dtype)


def _turn_angles_triton(positions, inv_freq, scaling, dtype):
    pairs, count = inv_freq.shape[0], positions.shape[0] * inv_freq.shape[0]
    cos, sin = torch.empty(2, positions.shape[0], pairs, dtype=dtype, device=positions.device)
    _turn_angles[(-(-count // 128),)](
        positions, inv_freq, cos, sin, count, pairs, float(scaling), BLOCK=128, num_warps=4,
        **dependent(positions.device.type),
    )  # fmt: skip
    return cos, sin


@jit
def _turn_angles(
    POSITIONS, INV_FREQ, COS, SIN, count, pairs, scaling, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    follow(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    position = tl.load(POSITIONS + at // pairs, mask=inside, other=0).to(tl.float32)
    turns = position * tl.load(INV_FREQ + at % pairs, mask=inside, other=0.0)
    tl.store(COS + at, (tl.cos(turns) * scaling).to(COS.dtype.element_ty), mask=inside)
    tl.store(SIN + at, (tl.sin(turns) * scaling).to(SIN.dtype.element_ty), mask=inside)
