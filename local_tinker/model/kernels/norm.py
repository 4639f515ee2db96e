"""RMSNorm (arXiv 1910.07467) with the residual sum before it, forward and backward.

y = w * x / sqrt(mean(x^2) + eps). Statistics are taken in fp32 (fp64 for fp64 input). Families round at different points:
"round_then_scale" rounds x / rms to the compute type before the weight multiplies it (Llama), "scale_then_round" after
(OLMo 2), "one_plus" is the latter with 1 + weight (Gemma). In bf16 the other order differs by a unit in the last place,
and a base model was trained with one of them.

Shapes: N rows, D the normalised size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import power_of_two, serves, tl, triton
from .launch import kernel

KINDS = ("round_then_scale", "scale_then_round", "one_plus")


def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: str) -> Tensor:
    """The definition, over the last dimension of x (..., D); `weight` (D,) is frozen."""
    if kind == "round_then_scale":
        return weight * F.rms_norm(x, x.shape[-1:], None, eps)
    wide = weight.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(x.to(wide.dtype), x.shape[-1:], 1.0 + wide if kind == "one_plus" else wide, eps).to(x.dtype)


def add_norm_reference(h, y, weight, eps, kind, out):
    total = h if y is None else h + y
    if kind == "round_then_scale" and out.dtype == total.dtype == weight.dtype:
        torch.mul(weight, F.rms_norm(total, total.shape[-1:], None, eps), out=out)  # `rms_norm`, without a copy
    else:
        out.copy_(rms_norm(total, weight, eps, kind))
    return total


def norm_backward_reference(dx, h, weight, eps, kind, residual, out, again):
    wide = torch.promote_types(h.dtype, torch.float32)
    x, scale = h.to(wide), weight.to(wide)
    scaled = dx.to(wide) * (1.0 + scale if kind == "one_plus" else scale)
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    unit = x * inverse
    # d unit_i / d x_j = inverse * (delta_ij - unit_i unit_j / D)
    dh = inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    out.copy_(dh if residual is None else dh.to(h.dtype) + residual)
    if again is not None:
        again.copy_(rms_norm(h, weight, eps, kind))


def add_norm(h: Tensor, y: Tensor | None, weight: Tensor, eps: float, kind: str, *, out: Tensor) -> Tensor:
    """out = norm(h + y); returns h + y, rounded to the compute type (h itself where y is None).

    Args:
        h: (N, D) contiguous. y, out: (N, D) with unit column stride; rows may be part of something wider.
    """
    if not serves(h):
        return add_norm_reference(h, y, weight, eps, kind, out)
    n, d = h.shape
    total = h if y is None else torch.empty_like(h)
    source = h if y is None else y
    _add_norm[(n,)](
        h, source, weight, out, total, d, eps, h.stride(0), source.stride(0), out.stride(0), total.stride(0),
        ADD=y is not None, KIND=KINDS.index(kind), BLOCK=power_of_two(d), num_warps=_warps(d),
    )  # fmt: skip
    return total


def norm_backward(
    dx: Tensor,
    h: Tensor,
    weight: Tensor,
    eps: float,
    kind: str,
    *,
    residual: Tensor | None,
    out: Tensor,
    again: Tensor | None = None,
) -> None:
    """out = residual + dh, where x = norm(h) and dx is x's gradient.

    Args:
        dx, residual, out: (N, D) with unit column stride. `out` may be `residual` or `dx` itself.
        again: gets norm(h), which the caller did not keep; may be `dx` itself, but not `out`.
    """
    if not serves(h):
        source = dx.clone() if out.data_ptr() == dx.data_ptr() else dx
        return norm_backward_reference(source, h, weight, eps, kind, residual, out, again)
    n, d = h.shape
    other = dx if residual is None else residual
    back = dx if again is None else again
    _norm_backward[(n,)](
        dx, h, weight, other, out, back, d, eps, dx.stride(0), h.stride(0), other.stride(0), out.stride(0), back.stride(0),
        RESIDUAL=residual is not None, AGAIN=again is not None, KIND=KINDS.index(kind),
        BLOCK=power_of_two(d), num_warps=_warps(d),
    )  # fmt: skip


def _warps(d: int) -> int:
    return 4 if d <= 2048 else 8 if d <= 8192 else 16


if triton is not None:

    @triton.jit
    def _normalise(x, w, D, eps, KIND: tl.constexpr, dtype):
        """fp32 row x and weight w -> (norm(x) in `dtype`, x / rms, 1 / rms)."""
        inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        unit = x * inverse
        if KIND == 0:
            y = unit.to(dtype).to(tl.float32) * w
        else:
            y = unit * w
        return y.to(dtype), unit, inverse

    @kernel
    def _add_norm(
        H, Y, W, OUT, TOTAL, D, eps, h_row, y_row, out_row, total_row,
        ADD: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        m = c < D
        h = tl.load(H + row * h_row + c, mask=m, other=0.0)
        if ADD:
            y = tl.load(Y + row * y_row + c, mask=m, other=0.0)
            h = (h.to(tl.float32) + y.to(tl.float32)).to(h.dtype)
            tl.store(TOTAL + row * total_row + c, h, mask=m)
        w = tl.load(W + c, mask=m, other=0.0).to(tl.float32)
        if KIND == 2:
            w += 1.0
        x, _, _ = _normalise(h.to(tl.float32), w, D, eps, KIND, h.dtype)
        tl.store(OUT + row * out_row + c, x, mask=m)

    @kernel
    def _norm_backward(
        DX, H, W, RES, OUT, BACK, D, eps, dx_row, h_row, res_row, out_row, back_row,
        RESIDUAL: tl.constexpr, AGAIN: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        m = c < D
        h = tl.load(H + row * h_row + c, mask=m, other=0.0)
        dx = tl.load(DX + row * dx_row + c, mask=m, other=0.0).to(tl.float32)
        w = tl.load(W + c, mask=m, other=0.0).to(tl.float32)
        if KIND == 2:
            w += 1.0
        x, unit, inverse = _normalise(h.to(tl.float32), w, D, eps, KIND, h.dtype)
        scaled = dx * w
        dh = inverse * (scaled - unit * (tl.sum(scaled * unit, 0) / D))
        if RESIDUAL:
            r = tl.load(RES + row * res_row + c, mask=m, other=0.0)
            dh = dh.to(h.dtype).to(tl.float32) + r.to(tl.float32)
        if AGAIN:
            tl.store(BACK + row * back_row + c, x, mask=m)
        tl.store(OUT + row * out_row + c, dh.to(h.dtype), mask=m)
