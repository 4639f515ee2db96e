"""The tensors of a LoRA pair (Hu et al., arXiv 2106.09685) and the dropout of its input.

Shapes: N packed tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

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


def gradient_leaf(tensor: Tensor, into: Tensor) -> Tensor:
    """The tensor as a leaf of autograd's graph, whose gradient is added to `into` and not kept besides."""

    def move(leaf: Tensor) -> None:
        into.add_(leaf.grad)
        leaf.grad = None

    leaf = tensor.detach().requires_grad_(True)
    leaf.register_post_accumulate_grad_hook(move)
    return leaf
