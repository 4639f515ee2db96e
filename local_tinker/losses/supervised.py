"""Losses that are weighted sums of log-probs.

Shapes: N packed tokens of a micro-batch, K targets a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LossData, LossInputs, LossTerms, Mean, Sum, weights_and_mask


def _weighted_sum(out: LossInputs, data: LossData) -> tuple[Tensor, Tensor]:
    weights, mask = weights_and_mask(data, out.logprobs)
    return (weights * torch.where(mask, out.logprobs, 0.0)).sum(), weights.sum()


def sft(out: LossInputs, data: LossData) -> LossTerms:
    """Negative log-likelihood of the trained tokens: ``-sum_i w_i log p(y_i)``, normalised by ``sum_i w_i``.

    Metrics:
        nll: nats a trained token, the loss itself.
    """
    total, weight = _weighted_sum(out, data)
    return LossTerms(-total, weight, {"nll": Mean(-total.detach(), weight)})


def cross_entropy(out: LossInputs, data: LossData) -> LossTerms:
    """Tinker's cross_entropy: the same sum, over (N,) or (N, K) targets, with divisor 1."""
    total, _ = _weighted_sum(out, data)
    return LossTerms(-total, 1.0, {"loss:sum": Sum(-total.detach())})


def linear(out: LossInputs, data: LossData) -> LossTerms:
    """``sum_i w_i log p(y_i)``: with ``w = dC/dlogp`` its gradient is that of a loss C computed elsewhere."""
    total, _ = _weighted_sum(out, data)
    return LossTerms(total, 1.0)
