"""RMSNorm (arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + eps), with each family's rounding points.

Statistics are taken in fp32 (fp64 for fp64 input). Where a family rounds before the weight multiplies, so do we: in
bf16 the other order differs by a unit in the last place, and a base model was trained with one of them.

Shapes: D the normalised size; x (..., D).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: str) -> Tensor:
    """Normalise the last dimension of x. `kind` is `FamilySpec.norm`; `weight` (D,) is frozen."""
    if kind == "round_then_scale":
        return weight * F.rms_norm(x, x.shape[-1:], None, eps)
    wide = weight.to(torch.promote_types(x.dtype, torch.float32))
    return _ScaleThenRound.apply(x, 1.0 + wide if kind == "one_plus" else wide, eps)


class _ScaleThenRound(torch.autograd.Function):
    """Keeps x in its own type for backward, where composed operations would keep an fp32 copy of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        wide, dn = x.to(weight.dtype), dy.to(weight.dtype) * weight
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ctx.eps)
        unit = wide * inverse
        # d unit_i / d x_j = inverse * (delta_ij - unit_i unit_j / D)
        return (inverse * (dn - unit * (dn * unit).mean(-1, keepdim=True))).to(x.dtype), None, None
