"""PPO over a rollout: the clipped surrogate plus a clipped value loss.

PPO is GAE plus this; the estimator is `advantages.gae`.

Shapes: N packed tokens of a micro-batch, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import LossData, LossInputs, LossTerms, check_number, constant, mean_over, weights_and_mask
from .policy import check_surrogate, policy_terms, sequence_length


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None
) -> tuple[Tensor, Tensor]:
    """(N,) ``max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2) / 2``, and where the clipped term was the larger."""
    plain = (values - returns) ** 2
    if value_clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    bounded = old_values + (values - old_values).clamp(-value_clip, value_clip)
    clipped = (bounded - returns) ** 2
    return torch.maximum(plain, clipped) / 2, clipped.detach() > plain.detach()


def ppo_rollout(
    out: LossInputs,
    data: LossData,
    *,
    clip_low: float | None,
    clip_high: float | None,
    value_clip: float | None,
    value_coefficient: float,
    old_logprobs: str,
    max_importance_ratio: float | None,
) -> LossTerms:
    """``sum_i (policy_i + value_coefficient value_i)`` over trained tokens, normalised by their number: one normaliser.

    The policy term is that of `policy_terms` (Eq. 7 of arXiv 1707.06347), the value term that of `value_losses`. The
    fields hold ``weights``, the sampler's ``logprobs``, ``advantages``, ``returns`` and ``old_values``, one a token.

    Metrics:
        policy_loss, value_loss (without its coefficient), value_clip_fraction, value_mean, return_mean, and those of
        `grpo` that do not need a reference.
    """
    weights, mask = weights_and_mask(data, out.logprobs)
    policy, _, metrics = policy_terms(
        out,
        data,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        old_logprobs=old_logprobs,
        max_importance_ratio=max_importance_ratio,
    )
    values = torch.where(mask, out.values.to(out.logprobs.dtype), 0.0)
    old_values, returns = (constant(data, name, values, mask) for name in ("old_values", "returns"))
    value, clipped = value_losses(values, old_values, returns, value_clip)
    total = (weights * (policy + value_coefficient * value)).sum()
    metrics |= {
        "policy_loss": mean_over(policy, mask),
        "value_loss": mean_over(value, mask),
        "value_clip_fraction": mean_over(clipped.to(value.dtype), mask),
        "value_mean": mean_over(values, mask),
        "return_mean": mean_over(returns, mask),
        "completion_length": sequence_length(mask, data, out.logprobs),
    }
    return LossTerms(total, weights.sum(), metrics)


def needs_ppo_rollout(_options: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"entropy", "values"})


def check_ppo_rollout(options: Mapping[str, Any]) -> None:
    check_surrogate(options)
    if options["value_clip"] is not None:
        check_number(options, "value_clip", above=0.0)
    check_number(options, "value_coefficient", low=0.0)
    check_number(options, "gamma", low=0.0, high=1.0)
    check_number(options, "gae_lambda", low=0.0, high=1.0)
    check_number(options, "beta", low=0.0)
