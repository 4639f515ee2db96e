"""Rows of raw logits -> log-prob of the target, entropy, and the gradient of the log-prob for the raw logits.

Two passes over a row in one program; the definition's half dozen passes over (C, V) temporaries become one read, one
read and one write.

Shapes: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import KERNEL_DTYPES, tl, triton, triton_ready
from .launch import kernel

_BLOCK = 4096


def logit_rows_serve(z: Tensor) -> bool:
    return z.dtype == torch.float32 and triton_ready(z.device.type)


def half_over(z: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A half-precision (C, V) over the memory of z (C, V) fp32, or None where only the definition serves."""
    return z.view(dtype)[:, : z.shape[1]] if logit_rows_serve(z) and dtype in KERNEL_DTYPES else None


def logit_rows_reference(z, y, scale, softcap, logprobs, entropy, grad):
    raw = z * scale
    shaped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    lse = shaped.logsumexp(1)
    logprobs.copy_(shaped.gather(1, y[:, None])[:, 0] - lse)
    p = torch.exp(shaped - lse[:, None])
    if entropy is not None:
        entropy.copy_(lse - (p * shaped).sum(1))
    if grad is not None:
        p = torch.zeros_like(p).scatter_(1, y[:, None], 1.0) - p
        grad.copy_(p * (scale if softcap is None else scale * (1.0 - (shaped / softcap) ** 2)))


def logit_rows(
    z: Tensor,
    y: Tensor,
    *,
    scale: float,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    grad: Tensor | None,
) -> None:
    """Fill logprobs (C,), entropy (C,) in nats and grad (C, V) from raw logits z (C, V) fp32 and targets y (C,).

    With t = cap * tanh(scale z / cap) (or scale z): logprob = t_y - lse(t), entropy = lse(t) - sum p t,
    grad = (onehot_y - p) dt/dz.

    `grad` may be `half_over(z)`, the first half of z's own rows: z is used up then.
    """
    if not logit_rows_serve(z):
        return logit_rows_reference(z, y, scale, softcap, logprobs, entropy, grad)
    _logit_rows[(z.shape[0],)](
        z, y, logprobs, logprobs if entropy is None else entropy, z if grad is None else grad, z.shape[1],
        z.stride(0), 0 if grad is None else grad.stride(0), scale, softcap or 1.0,
        CAP=softcap is not None, ENTROPY=entropy is not None, GRAD=grad is not None, BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _shape(z, scale, cap, CAP: tl.constexpr):
        t = z * scale
        if CAP:
            t = cap * (2.0 * tl.sigmoid(2.0 * t / cap) - 1.0)
        return t

    @kernel
    def _logit_rows(
        Z, Y, LOGP, ENT, GRAD_OUT, V, z_row, g_row, scale, cap,
        CAP: tl.constexpr, ENTROPY: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, BLOCK)
        y = tl.load(Y + row)
        # every lane keeps a running maximum and sums of its own; they meet once at the end
        m = tl.full([BLOCK], -float("inf"), tl.float32)
        d = tl.zeros([BLOCK], tl.float32)
        e = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            at = start + lane
            ok = at < V
            t = _shape(tl.load(Z + row * z_row + at, mask=ok, other=0.0), scale, cap, CAP)
            t = tl.where(ok, t, -float("inf"))
            n = tl.maximum(m, t)
            # a lane that has seen nothing yet has n = -inf; its sums are 0 and stay 0
            keep = tl.where(m == n, 1.0, tl.exp(m - n))
            p = tl.where(ok, tl.exp(t - n), 0.0)
            d = d * keep + p
            if ENTROPY:
                e = e * keep + tl.where(ok, p * t, 0.0)
            m = n
        top = tl.max(m, 0)
        share = tl.exp(m - top)
        total = tl.sum(d * share, 0)
        lse = top + tl.log(total)
        target = _shape(tl.load(Z + row * z_row + y), scale, cap, CAP)
        tl.store(LOGP + row, target - lse)
        if ENTROPY:
            tl.store(ENT + row, lse - tl.sum(e * share, 0) / total)
        if GRAD:
            for start in range(0, V, BLOCK):
                at = start + lane
                ok = at < V
                t = _shape(tl.load(Z + row * z_row + at, mask=ok, other=0.0), scale, cap, CAP)
                g = (tl.where(at == y, 1.0, 0.0) - tl.exp(t - lse)) * scale
                if CAP:
                    g = g * (1.0 - (t / cap) * (t / cap))
                # over z's own row a block's gradient lies where this block, or one before it, was read
                tl.debug_barrier()
                tl.store(GRAD_OUT + row * g_row + at, g, mask=ok)
