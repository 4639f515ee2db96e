"""Direct preference optimisation.

Shapes: N packed tokens of a micro-batch, S sequences, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from .base import LossData, LossInputs, LossTerms, Mean, check_choice, check_number, segment_sums, weights_and_mask

VARIANTS = ("sigmoid", "ipo")


def dpo(
    out: LossInputs,
    data: LossData,
    *,
    beta: float,
    label_smoothing: float,
    variant: str,
    reference_free: bool,
) -> LossTerms:
    """Preference loss of P pairs, normalised by P.

    With ``h = sum_i log(pi/ref)`` over an answer's trained tokens, and ``d = h(chosen) - h(rejected)``:

    - "sigmoid": ``-(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d)``, Eq. 7 of arXiv 2305.18290 at
      ``eps = label_smoothing = 0``. Sums, not means, over tokens.
    - "ipo": ``(d' - 1 / (2 beta))^2``, Eq. 17 of arXiv 2310.12036, where d' is the difference of the *means* of
      ``log(pi/ref)`` over each answer's tokens, so that beta does not depend on the length.

    ``reference_free`` takes ref as 1. Differences are taken token by token before they are summed: equal policies give
    exactly 0, and the sigmoid loss exactly ln 2.

    Metrics:
        reward_margin, chosen_reward, rejected_reward: ``beta h`` and their difference; accuracy: how often the chosen
        answer has the greater reward; chosen_logprobs, rejected_logprobs: sums over an answer.
    """
    weights, mask = weights_and_mask(data, out.logprobs)
    logprobs = torch.where(mask, out.logprobs, 0.0)
    gains = logprobs
    if not reference_free:
        gains = torch.where(mask, out.logprobs - out.reference_logprobs.to(out.logprobs.dtype), 0.0)
    chosen, rejected = data.pairs[:, 0], data.pairs[:, 1]
    gains = segment_sums(weights * gains, data)  # (S,)
    lengths = segment_sums(weights, data)
    losses = _pair_losses(gains, lengths, chosen, rejected, beta, label_smoothing, variant)  # (P,)

    pairs = float(data.pairs.shape[0])
    rewards = beta * gains.detach()
    sums = segment_sums(weights * logprobs.detach(), data)
    margin = rewards[chosen] - rewards[rejected]
    metrics = {
        "reward_margin": Mean(margin.sum(), pairs),
        "accuracy": Mean((margin > 0).to(margin.dtype).sum(), pairs),
        "chosen_reward": Mean(rewards[chosen].sum(), pairs),
        "rejected_reward": Mean(rewards[rejected].sum(), pairs),
        "chosen_logprobs": Mean(sums[chosen].sum(), pairs),
        "rejected_logprobs": Mean(sums[rejected].sum(), pairs),
    }
    return LossTerms(losses.sum(), pairs, metrics)


def _pair_losses(
    gains: Tensor, lengths: Tensor, chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float, variant: str
) -> Tensor:
    if variant == "ipo":
        # Segments of other datums may be empty; a pair's answers never are.
        means = gains / torch.where(lengths != 0, lengths, 1.0)
        return (means[chosen] - means[rejected] - 1 / (2 * beta)) ** 2
    scores = beta * (gains[chosen] - gains[rejected])
    if label_smoothing == 0:
        return -F.logsigmoid(scores)
    return -(1 - label_smoothing) * F.logsigmoid(scores) - label_smoothing * F.logsigmoid(-scores)


def needs_dpo(options: Mapping[str, Any]) -> frozenset[str]:
    return frozenset() if options["reference_free"] else frozenset({"reference"})


def check_dpo(options: Mapping[str, Any]) -> None:
    check_number(options, "beta", above=0.0)
    check_number(options, "label_smoothing", low=0.0, high=0.5)
    check_choice(options, "variant", VARIANTS)
    check_choice(options, "reference_free", (True, False))
    if options["variant"] == "ipo" and options["label_smoothing"] != 0:
        raise UsageError("label_smoothing belongs to variant='sigmoid'; leave it at 0 with variant='ipo'")
