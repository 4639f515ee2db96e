"""Hidden states -> log-probabilities of target tokens, in chunks; full logits never exist.

With the head frozen, d logp_t / d h_t = W[y_t] - sum_v p_v W_v does not depend on the loss. One forward pass computes the
log-probs and stores that H-vector, and the backward is a multiplication, for every loss of log-probs alike.

Shapes: N packed tokens, H hidden, V vocabulary, K targets a position, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels.head import half_over, logit_rows
from .lora import LoraPair

Product = Callable[[Tensor, Tensor], Tensor]  # of rows and a weight
CHUNK = 1024  # rows; (C, V) fp32 logits of a 128k vocabulary are then 0.5 GiB


@dataclass(frozen=True, eq=False)
class Head:
    """The output projection and what the model does to its logits.

    Args:
        weight: (V, H), frozen, in the compute type.
        bias: (V,) or None.
        softcap: logits become cap * tanh(logits / cap) (Gemma 2).
        scale: logits are multiplied by it before the cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    # CPUs have no bf16 product with fp32 output, so there the weight is widened once: 4 bytes a weight, exact logits.
    wide: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.weight.device.type == "cpu" and self.weight.dtype in (torch.bfloat16, torch.float16):
            object.__setattr__(self, "wide", self.weight.float())

    def raw(
        self, h: Tensor, pair: LoraPair | None = None, lora_scale: float = 1.0, product: Product = F.linear
    ) -> Tensor:
        """h (C, H) -> h W^T + s (h A^T) B^T + b (C, V) in fp32 (fp64 for fp64 input), before scale and cap."""
        if self.wide is not None:
            z = product(h.float(), self.wide)
        elif h.is_cuda and h.dtype in (torch.bfloat16, torch.float16):
            z = torch.mm(h, self.weight.t(), out_dtype=torch.float32)
        else:
            z = product(h, self.weight)
        if pair is not None:
            a, b = pair
            z = torch.addmm(z, (h @ a.t()).to(z.dtype), b.t().to(z.dtype), alpha=lora_scale)
        return z if self.bias is None else z + self.bias.to(z.dtype)

    def shape(self, z: Tensor) -> Tensor:
        """Scale and soft-cap raw logits."""
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def logits(
        self, h: Tensor, pair: LoraPair | None = None, lora_scale: float = 1.0, product: Product = F.linear
    ) -> Tensor:
        """h (N, H) -> (N, V) fp32 (fp64 for fp64 input).

        Args:
            product: of rows and a weight, see `linear.project`.
        """
        return self.shape(self.raw(h, pair, lora_scale, product))

    def slope(self, z: Tensor) -> Tensor | float:
        """d shaped / d raw, from shaped logits."""
        return self.scale if self.softcap is None else self.scale * (1.0 - (z / self.softcap) ** 2)


def target_logprobs(
    h: Tensor,
    head: Head,
    targets: Tensor,
    *,
    pair: LoraPair | None = None,
    lora_scale: float = 1.0,
    entropy: bool = False,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) with gradient for h (and the head's adapter pair, when there is one).

    Args:
        h: (N, H) final hidden states. targets: (N,) or (N, K) int64. chunk: rows computed at a time.
        entropy: also return the distribution's entropy in nats (N,), without gradient.

    Returns:
        log-probs of the shape of `targets`, fp32 (fp64 for fp64 input), and the entropy or None.
    """
    columns = targets if targets.ndim == 2 else targets[:, None]
    if pair is not None:
        logprobs, spread = _AdaptedHead.apply(h, pair[0], pair[1], head, columns, lora_scale, entropy, chunk)
    else:
        logprobs, spread = _FrozenHead.apply(h, head, columns, entropy, chunk)
    return (logprobs if targets.ndim == 2 else logprobs[:, 0]), (spread if entropy else None)


def _chunk_logprobs(z: Tensor, y: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Shaped logits (C, V), targets (C, K) -> log-probs (C, K), probabilities (C, V), entropy (C,)."""
    lse = z.logsumexp(1, keepdim=True)
    logprobs = z.gather(1, y) - lse
    p = torch.exp(z - lse)
    spread = lse[:, 0] - (p * z).sum(1) if entropy else None
    return logprobs, p, spread


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, head: Head, y: Tensor, entropy: bool, chunk: int):
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(y.shape, device=h.device, dtype=wide)
        spread = torch.empty(h.shape[0] if entropy else 0, device=h.device, dtype=wide)
        part = _one_target if y.shape[1] == 1 else _many_targets
        mean, slopes = part(h, head, y, logprobs, spread if entropy else None, chunk, ctx.needs_input_grad[0])
        ctx.save_for_backward(mean, slopes, y)
        ctx.head = head
        ctx.mark_non_differentiable(spread)
        return logprobs, spread

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        mean, slopes, y = ctx.saved_tensors
        if slopes is None:
            return mean * grad.to(mean.dtype), None, None, None, None
        weight = ctx.head.weight[y].to(grad.dtype)  # (N, K, H)
        dh = torch.einsum("nk,nkh->nh", grad * slopes, weight) - grad.sum(1, keepdim=True) * mean.to(grad.dtype)
        return dh.to(mean.dtype), None, None, None, None


def _one_target(h, head: Head, y, logprobs, spread, chunk: int, need: bool) -> tuple[Tensor | None, None]:
    """Fill log-probs and entropy; returns d logprob / d h (N, H)."""
    gradient = torch.empty_like(h) if need else None
    for start in range(0, h.shape[0], chunk):
        rows = slice(start, start + chunk)
        z = head.raw(h[rows])
        g = _gradient_room(z, head, h.dtype) if need else None
        logit_rows(
            z,
            y[rows, 0],
            scale=head.scale,
            softcap=head.softcap,
            logprobs=logprobs[rows, 0],
            entropy=None if spread is None else spread[rows],
            grad=g,
        )
        if need:
            gradient[rows] = _times_weight(g, head, h.dtype)
        del z, g  # before the next chunk's logits
    return gradient, None


def _gradient_room(z: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """Where the gradient of the logits goes: over the logits themselves if a kernel can do it."""
    if head.wide is not None:
        return torch.empty_like(z)
    over = half_over(z, dtype)
    return torch.empty_like(z, dtype=dtype) if over is None else over


def _many_targets(h, head: Head, y, logprobs, spread, chunk: int, need: bool) -> tuple[Tensor | None, Tensor | None]:
    """Fill log-probs and entropy; returns sum_v p_v s_v W_v (N, H) and the slopes s at the targets (N, K)."""
    mean = torch.empty_like(h) if need else None
    slopes = torch.empty_like(logprobs) if need else None
    for start in range(0, h.shape[0], chunk):
        rows = slice(start, start + chunk)
        z = head.logits(h[rows])
        logprobs[rows], p, chunk_spread = _chunk_logprobs(z, y[rows], spread is not None)
        if spread is not None:
            spread[rows] = chunk_spread
        if need:
            slope = head.slope(z)
            slopes[rows] = slope.gather(1, y[rows]) if torch.is_tensor(slope) else slope
            mean[rows] = _times_weight(p.mul_(slope), head, h.dtype)
    return mean, slopes


def _times_weight(g: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """(C, V) @ W (V, H): in fp32 where a widened weight exists, else in the compute type."""
    return (g @ head.wide).to(dtype) if head.wide is not None else g.to(dtype) @ head.weight


class _AdaptedHead(torch.autograd.Function):
    """The head with a trained adapter: its chunks are recomputed in backward, since dA and dB need the softmax again."""

    @staticmethod
    def forward(ctx, h, a, b, head: Head, y: Tensor, scale: float, entropy: bool, chunk: int):
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(y.shape, device=h.device, dtype=wide)
        spread = torch.empty(h.shape[0] if entropy else 0, device=h.device, dtype=wide)
        for start in range(0, h.shape[0], chunk):
            rows = slice(start, start + chunk)
            logprobs[rows], _, chunk_spread = _chunk_logprobs(head.logits(h[rows], (a, b), scale), y[rows], entropy)
            if entropy:
                spread[rows] = chunk_spread
        ctx.save_for_backward(h, a, b, y)
        ctx.head, ctx.scale, ctx.chunk = head, scale, chunk
        ctx.mark_non_differentiable(spread)
        return logprobs, spread

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        h, a, b, y = ctx.saved_tensors
        head, scale = ctx.head, ctx.scale
        dh = torch.empty_like(h)
        da, db = torch.zeros_like(a, dtype=grad.dtype), torch.zeros_like(b, dtype=grad.dtype)
        for start in range(0, h.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            z = head.logits(h[rows], (a, b), scale)
            _, dz, _ = _chunk_logprobs(z, y[rows], False)
            dz.mul_(-grad[rows].sum(1, keepdim=True)).scatter_add_(1, y[rows], grad[rows])
            dz *= head.slope(z)  # (C, V)
            thin = dz @ b.to(dz.dtype)  # (C, R)
            wide_h = h[rows].to(dz.dtype)
            dh[rows] = _times_weight(dz, head, h.dtype) + (scale * (thin @ a.to(dz.dtype))).to(h.dtype)
            da += scale * (thin.t() @ wide_h)
            db += scale * (dz.t() @ (wide_h @ a.to(dz.dtype).t()))
        return dh, da.to(a.dtype), db.to(b.dtype), None, None, None, None, None
