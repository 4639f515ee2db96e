"""Rotation of the q and k heads of a packed qkv projection, with the norms over heads that some families have.

Each product and each sum is rounded to the type of cos and sin, as transformers' modules do (OLMo 2 alone keeps them in
fp32). Dimensions past 2 J pass through.

Shapes: N packed tokens, Hq / Hkv query and key-value heads, D head dimension, J rotated pairs; qkv (N, (Hq + 2 Hkv) D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import power_of_two, serves, tl, triton
from .launch import kernel
from .norm import KINDS, norm_backward_reference, rms_norm


@dataclass(frozen=True, eq=False)
class HeadLayout:
    """Where the heads of a qkv row are, and what is done to q and k before they are rotated.

    Attributes:
        norm: how a norm rounds, see `norm.KINDS`. per_head: it runs over each head, else over the whole projection.
        q_norm, k_norm: weights of these norms, or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    norm: str = "round_then_scale"
    eps: float = 0.0
    per_head: bool = True
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        return [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q (N, Hq, D), k and v (N, Hkv, D)."""
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in qkv.split(self.sizes, dim=-1))


Angles = tuple[Tensor, Tensor]  # cos, sin: (N, 1, J)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_j, x_{j+J}) of x (N, heads, D); a new tensor."""
    pairs = cos.shape[-1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    turned = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    if 2 * pairs < x.shape[-1]:
        turned.append(x[..., 2 * pairs :])
    return torch.cat(turned, dim=-1)


def _norm_rows(x: Tensor, layout: HeadLayout) -> Tensor:
    """(N, heads, D) as the rows a head norm runs over."""
    return x if layout.per_head else x.flatten(1)


def _rotate_into(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotate` in place: the same products and sums, without a copy of x."""
    pairs = cos.shape[-1]
    first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    crossed = second * cos, first * sin
    first.copy_((first * cos).sub_(second * sin))
    second.copy_(crossed[0].add_(crossed[1]))


def rotate_qk_reference(qkv, layout, angles, out):
    if layout.q_norm is None and angles is not None and out is qkv:
        turned = sum(layout.sizes[:2])  # q and k stand side by side
        return _rotate_into(qkv[:, :turned].unflatten(-1, (-1, layout.head_dim)), *angles)
    q, k, v = layout.split(qkv)
    parts = []
    for x, weight in ((q, layout.q_norm), (k, layout.k_norm)):
        if weight is not None:
            x = rms_norm(_norm_rows(x, layout), weight, layout.eps, layout.norm).view(x.shape)
        parts.append((x if angles is None else rotate(x, *angles)).flatten(1))
    out.copy_(torch.cat([*parts, v.flatten(1)], dim=-1))


def rotate_back_reference(dqkv, raw, layout, angles):
    (dq, dk, _), (q, k, _) = layout.split(dqkv), layout.split(raw)
    for target, x, weight in ((dq, q, layout.q_norm), (dk, k, layout.k_norm)):
        dx = target
        if angles is not None:
            dx = rotate(dx, angles[0], -angles[1])
        if weight is not None:
            rows, back = _norm_rows(x, layout), torch.empty_like(_norm_rows(dx, layout))
            norm_backward_reference(_norm_rows(dx, layout), rows, weight, layout.eps, layout.norm, None, back, None)
            dx = back.view(dx.shape)
        if dx is not target:
            target.copy_(dx)


def rotate_qk(qkv: Tensor, layout: HeadLayout, angles: Angles | None) -> Tensor:
    """Normed and rotated q and k with v beside them, laid out like `qkv`: in place without head norms, else new."""
    if angles is None and layout.q_norm is None:
        return qkv
    out = qkv if layout.q_norm is None else torch.empty_like(qkv)
    if not _kernel_serves(qkv, layout, angles):
        rotate_qk_reference(qkv, layout, angles, out)
        return out
    cos, sin = angles
    _rotate[(qkv.shape[0],)](
        qkv, out, cos, sin, *_weights(layout, qkv), qkv.stride(0), out.stride(0), **_constants(layout, angles)
    )
    return out


def rotate_back_(dqkv: Tensor, raw: Tensor, layout: HeadLayout, angles: Angles | None) -> None:
    """In place: the gradient of the rotated qkv row becomes that of the row `rotate_qk` was given.

    Args:
        raw: that row; read where the layout has head norms only.
    """
    if angles is None and layout.q_norm is None:
        return
    if not _kernel_serves(raw, layout, angles):
        return rotate_back_reference(dqkv, raw, layout, angles)
    cos, sin = angles
    _rotate_back[(raw.shape[0],)](
        dqkv, raw, cos, sin, *_weights(layout, raw), dqkv.stride(0), raw.stride(0), **_constants(layout, angles)
    )


def _kernel_serves(qkv: Tensor, layout: HeadLayout, angles: Angles | None) -> bool:
    if angles is None or not serves(qkv) or not layout.per_head:
        return False
    return 2 * angles[0].shape[-1] == layout.head_dim


def _weights(layout: HeadLayout, qkv: Tensor) -> tuple[Tensor, Tensor]:
    return (qkv, qkv) if layout.q_norm is None else (layout.q_norm, layout.k_norm)


def _constants(layout: HeadLayout, angles: Angles) -> dict:
    cos = angles[0]
    return dict(
        HQ=layout.heads,
        HK=layout.kv_heads,
        D=layout.head_dim,
        J=cos.shape[-1],
        JB=power_of_two(cos.shape[-1]),
        NORM=layout.q_norm is not None,
        KIND=KINDS.index(layout.norm),
        EPS=layout.eps,
        ROUND=cos.dtype != torch.float32,
        QB=power_of_two(layout.heads),
        KB=power_of_two(layout.kv_heads),
        num_warps=4,
    )


if triton is not None:

    @triton.jit
    def _turn(a, b, c, s, ROUND: tl.constexpr, dtype):
        """fp32 halves a, b -> rotated halves, each product rounded where the definition rounds it."""
        if ROUND:
            x = (a * c).to(dtype).to(tl.float32) - (b * s).to(dtype).to(tl.float32)
            y = (b * c).to(dtype).to(tl.float32) + (a * s).to(dtype).to(tl.float32)
        else:
            x = a * c - b * s
            y = b * c + a * s
        return x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)

    @triton.jit
    def _halves(P, at, ok, J: tl.constexpr):
        return tl.load(P + at, mask=ok, other=0.0).to(tl.float32), tl.load(P + J + at, mask=ok, other=0.0).to(
            tl.float32
        )

    @triton.jit
    def _weights_of(W, j, J: tl.constexpr, KIND: tl.constexpr):
        lo, hi = _halves(W, j, j < J, J)
        if KIND == 2:
            lo += 1.0
            hi += 1.0
        return lo[None, :], hi[None, :]

    @triton.jit
    def _rotate_heads(
        X, OUT, W, c, s, COUNT: tl.constexpr, BLOCK: tl.constexpr, J: tl.constexpr, JB: tl.constexpr,
        NORM: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr, ROUND: tl.constexpr,
    ):  # fmt: skip
        h, j = tl.arange(0, BLOCK), tl.arange(0, JB)
        at = h[:, None] * (2 * J) + j[None, :]
        ok = (h[:, None] < COUNT) & (j[None, :] < J)
        dtype = OUT.dtype.element_ty
        a, b = _halves(X, at, ok, J)
        if NORM:
            lo, hi = _weights_of(W, j, J, KIND)
            inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * J) + EPS)[:, None]
            if KIND == 0:
                a = (a * inverse).to(dtype).to(tl.float32) * lo
                b = (b * inverse).to(dtype).to(tl.float32) * hi
            else:
                a = a * inverse * lo
                b = b * inverse * hi
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
        a, b = _turn(a, b, c, s, ROUND, dtype)
        tl.store(OUT + at, a, mask=ok)
        tl.store(OUT + J + at, b, mask=ok)

    @kernel
    def _rotate(
        X, OUT, COS, SIN, QW, KW, x_row, out_row, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, J: tl.constexpr,
        JB: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr, ROUND: tl.constexpr,
        QB: tl.constexpr, KB: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, JB)
        c = tl.load(COS + row * J + j, mask=j < J).to(tl.float32)[None, :]
        s = tl.load(SIN + row * J + j, mask=j < J).to(tl.float32)[None, :]
        X += row * x_row
        OUT += row * out_row
        _rotate_heads(X, OUT, QW, c, s, HQ, QB, J, JB, NORM, KIND, EPS, ROUND)
        _rotate_heads(X + HQ * D, OUT + HQ * D, KW, c, s, HK, KB, J, JB, NORM, KIND, EPS, ROUND)
        if NORM:  # not in place: v comes along
            _copy_heads(X + (HQ + HK) * D, OUT + (HQ + HK) * D, HK, KB, D, 2 * JB)

    @triton.jit
    def _copy_heads(FROM, TO, COUNT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DB: tl.constexpr):
        h, d = tl.arange(0, BLOCK), tl.arange(0, DB)
        at = h[:, None] * D + d[None, :]
        ok = (h[:, None] < COUNT) & (d[None, :] < D)
        tl.store(TO + at, tl.load(FROM + at, mask=ok), mask=ok)

    @triton.jit
    def _rotate_heads_back(
        DX, X, W, c, s, COUNT: tl.constexpr, BLOCK: tl.constexpr, J: tl.constexpr, JB: tl.constexpr,
        NORM: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr, ROUND: tl.constexpr,
    ):  # fmt: skip
        h, j = tl.arange(0, BLOCK), tl.arange(0, JB)
        at = h[:, None] * (2 * J) + j[None, :]
        ok = (h[:, None] < COUNT) & (j[None, :] < J)
        a, b = _halves(DX, at, ok, J)
        a, b = _turn(a, b, c, -s, ROUND, DX.dtype.element_ty)
        if NORM:
            lo, hi = _weights_of(W, j, J, KIND)
            xa, xb = _halves(X, at, ok, J)
            inverse = tl.rsqrt((tl.sum(xa * xa, 1) + tl.sum(xb * xb, 1)) / (2 * J) + EPS)[:, None]
            ua, ub, a, b = xa * inverse, xb * inverse, a * lo, b * hi
            mean = ((tl.sum(a * ua, 1) + tl.sum(b * ub, 1)) / (2 * J))[:, None]
            a, b = inverse * (a - ua * mean), inverse * (b - ub * mean)
        tl.store(DX + at, a, mask=ok)
        tl.store(DX + J + at, b, mask=ok)

    @kernel
    def _rotate_back(
        DX, X, COS, SIN, QW, KW, dx_row, x_row, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, J: tl.constexpr,
        JB: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr, ROUND: tl.constexpr,
        QB: tl.constexpr, KB: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, JB)
        c = tl.load(COS + row * J + j, mask=j < J).to(tl.float32)[None, :]
        s = tl.load(SIN + row * J + j, mask=j < J).to(tl.float32)[None, :]
        DX += row * dx_row
        X += row * x_row
        _rotate_heads_back(DX, X, QW, c, s, HQ, QB, J, JB, NORM, KIND, EPS, ROUND)
        _rotate_heads_back(DX + HQ * D, X + HQ * D, KW, c, s, HK, KB, J, JB, NORM, KIND, EPS, ROUND)
