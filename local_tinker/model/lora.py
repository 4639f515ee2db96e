"""LoRA projections (Hu et al., arXiv 2106.09685): y = x W^T + b + s (x A^T) B^T, unmerged.

Several projections that read the same x are computed as one group. The adapter is never merged into W: a dequantised
weight sits on the bf16 grid, and small updates added to it would be rounded away.

Shapes: N packed tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import FrozenLinear

LoraPair = tuple[Tensor, Tensor]  # A (R, I), B (O, R)


@dataclass(frozen=True)
class LoraDropout:
    """Dropout on the adapter's input, replayable: each document's mask depends on its own seed, the module's path and its
    length alone. A recomputed layer drops the same entries, another cut into micro-batches too, and no global generator
    is touched.

    Args:
        p: share of entries dropped. seeds, lengths: of each packed document, in order.
    """

    p: float
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]

    def document(self, i: int) -> LoraDropout:
        """The dropout of one document alone."""
        return LoraDropout(self.p, self.seeds[i : i + 1], self.lengths[i : i + 1])

    def __call__(self, x: Tensor, path: str) -> Tensor:
        keep = torch.cat([self._keep(x, seed, n, path) for seed, n in zip(self.seeds, self.lengths, strict=True)])
        return torch.where(keep, x / (1.0 - self.p), torch.zeros((), dtype=x.dtype, device=x.device))

    def _keep(self, x: Tensor, seed: int, length: int, path: str) -> Tensor:
        mixed = zlib.crc32(f"{seed}/{path}".encode())  # torch's CPU generator reads 32 bits of a seed
        generator = torch.Generator(device=x.device).manual_seed(mixed)
        return torch.rand((length, x.shape[-1]), device=x.device, generator=generator, dtype=torch.float32) >= self.p


def project(
    x: Tensor,
    linears: Sequence[FrozenLinear],
    loras: Sequence[LoraPair | None],
    scale: float,
    *,
    dropout: LoraDropout | None = None,
) -> list[Tensor]:
    """x (N, I) -> one (N, O_i) a linear.

    Keeps x and the thin x A^T for backward; weights are dequantised again there. With `dropout` the adapter's part is
    composed of plain operations, since each linear then reads its own masked x.
    """
    if dropout is None or not any(loras):
        flat = [t for pair in loras for t in (pair if pair is not None else (None, None))]
        return list(LoraGroup.apply(x, scale, tuple(linears), *flat))
    outputs = LoraGroup.apply(x, scale, tuple(linears), *([None] * (2 * len(linears))))
    return [
        y if pair is None else y + (dropout(x, linear.path) @ pair[0].t()) @ pair[1].t() * scale
        for y, linear, pair in zip(outputs, linears, loras, strict=True)
    ]


class LoraGroup(torch.autograd.Function):
    """Projections of one x. Backward: dx = sum_i dy_i W_i + s (dy_i B_i) A_i, dA_i = s (dy_i B_i)^T x, dB_i = s dy_i^T (x A_i^T)."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float, linears: tuple[FrozenLinear, ...], *flat: Tensor | None):
        outputs, saved = [], [x]
        for i, linear in enumerate(linears):
            y = torch.nn.functional.linear(x, linear.dense(), linear.bias)
            a, b = flat[2 * i], flat[2 * i + 1]
            if a is not None:
                thin = x @ a.t()  # (N, R)
                y = torch.addmm(y, thin, b.t(), alpha=scale)
                saved += [a, b, thin]
            outputs.append(y)
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.linears, ctx.adapted = (
            scale,
            linears,
            tuple(flat[2 * i] is not None for i in range(len(linears))),
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, *saved = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        dx, grads, at = None, [], 0
        for linear, dy, adapted in zip(ctx.linears, dys, ctx.adapted, strict=True):
            if need_x:
                dx = dy @ linear.dense() if dx is None else torch.addmm(dx, dy, linear.dense())
            if not adapted:
                grads += [None, None]
                continue
            a, b, thin = saved[at : at + 3]
            at += 3
            thin_grad = dy @ b  # (N, R)
            if need_x:
                dx = torch.addmm(dx, thin_grad, a, alpha=ctx.scale)
            grads += [(thin_grad.t() @ x).mul_(ctx.scale), (dy.t() @ thin).mul_(ctx.scale)]
        return dx, None, None, *grads
