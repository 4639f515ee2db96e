"""The clipped surrogate with its options (GRPO), and Tinker's policy losses.

GRPO is an advantage estimator plus this surrogate; the estimator is `advantages.group_advantages`.

Shapes: N packed tokens of a micro-batch, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .base import (
    MAX_LOG_RATIO,
    LossData,
    LossInputs,
    LossTerms,
    Metric,
    Sum,
    check_choice,
    check_number,
    constant,
    importance_ratio,
    max_over,
    mean_over,
    segment_sums,
    weights_and_mask,
)

AGGREGATIONS = ("token", "sequence", "constant")
KL_ESTIMATORS = ("k3", "k2")
OLD_LOGPROBS = ("sampler", "trainer")


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float | None, high: float | None) -> Tensor:
    """(N,) ``-min(r A, clip(r, low, high) A)``, Eq. 7 of arXiv 1707.06347; ``-r A`` when both limits are None."""
    if low is None and high is None:
        return -ratio * advantages
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def policy_terms(
    out: LossInputs,
    data: LossData,
    mask: Tensor,
    *,
    clip_low: float | None,
    clip_high: float | None,
    old_logprobs: str,
    max_importance_ratio: float | None,
) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    """The clipped surrogate of every token (N,), the log of its ratio (N,) and the metrics both RL losses share.

    ``old_logprobs="sampler"``: ``r = pi / pi_sampler``; with ``max_importance_ratio=C`` and no clip, the surrogate is
    ``-min(r, C) A pi / pi'`` with r and ``pi' = pi`` constant: gradient ``-min(r, C) A dlog pi``.
    ``old_logprobs="trainer"``: ``r = pi / pi_old`` with the field ``old_logprobs`` (in the first pass there is none and
    ``pi_old = pi``), and the surrogate is multiplied by the constant ``min(pi_old / pi_sampler, C)`` when C is given.
    """
    logprobs = out.logprobs
    advantages = constant(data, "advantages", logprobs, mask)
    sampler = constant(data, "logprobs", logprobs, mask)
    old = sampler
    if old_logprobs == "trainer":
        old = constant(data, "old_logprobs", logprobs) if "old_logprobs" in data.fields else logprobs.detach()
    ratio, log_ratio = importance_ratio(logprobs, old, mask)
    low = None if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high

    metrics = ratio_metrics(ratio, log_ratio, advantages, mask, low, high)
    if max_importance_ratio is None:
        losses = clipped_surrogate(ratio, advantages, low, high)
    elif old_logprobs == "trainer":
        correction, _ = importance_ratio(torch.where(mask, old, 0.0), sampler, mask)
        losses = correction.clamp(max=max_importance_ratio) * clipped_surrogate(ratio, advantages, low, high)
        metrics |= {
            "importance_ratio_mean": mean_over(correction, mask),
            "importance_ratio_max": max_over(correction, mask),
        }
    else:
        losses = truncated_surrogate(torch.where(mask, logprobs, 0.0), ratio, advantages, max_importance_ratio)
    if out.entropy is not None:
        metrics["entropy"] = mean_over(out.entropy, mask)
    if "own_version" in data.fields:
        gap = torch.where(mask, logprobs.detach() - sampler, 0.0).abs()
        own = mask & (data.fields["own_version"] != 0)
        metrics |= {"logprob_gap_mean": mean_over(gap, own), "logprob_gap_max": max_over(gap, own)}
    return losses, log_ratio, metrics


def truncated_surrogate(logprobs: Tensor, ratio: Tensor, advantages: Tensor, max_importance_ratio: float) -> Tensor:
    """(N,) ``-min(r, C) A`` whose gradient is ``-min(r, C) A dlog pi``: the weight is a constant, pi is not."""
    weight = ratio.detach().clamp(max=max_importance_ratio)
    return -weight * (logprobs - logprobs.detach()).exp() * advantages


def ratio_metrics(
    ratio: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float | None, high: float | None
) -> dict[str, Metric]:
    """Ratio mean and maximum, and the share of tokens whose gradient the clip has cut on either side."""
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    metrics: dict[str, Metric] = {"ratio_mean": mean_over(ratio, mask), "ratio_max": max_over(ratio, mask)}
    # (r - 1) - log r, an estimate of KL(old || pi) that is never negative.
    metrics["approx_kl"] = mean_over(torch.expm1(log_ratio) - log_ratio, mask)
    if low is not None:
        metrics["clip_fraction_low"] = mean_over(((ratio < low) & (advantages < 0)).to(ratio.dtype), mask)
    if high is not None:
        metrics["clip_fraction_high"] = mean_over(((ratio > high) & (advantages > 0)).to(ratio.dtype), mask)
    return metrics


def kl_to_reference(logprobs: Tensor, reference: Tensor, log_ratio: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """(N,) estimate of KL(pi || ref) under samples of the old policy, 0 where `mask` is False.

    With ``x = log ref - log pi`` and ``r = pi / pi_old``: "k2" is ``r x^2 / 2`` with r constant, "k3" is
    ``r (e^x - x - 1)`` with r differentiated, whose expectation is the KL itself. Both have the gradient
    ``-r x dlog pi``, which is unbiased (arXiv 2512.21852); k3 without r would have that of KL(ref || pi).
    """
    x = torch.where(mask, reference - logprobs, 0.0)
    weight = log_ratio.detach().exp()
    quadratic = weight * x**2 / 2
    if estimator == "k2":
        return quadratic
    # The value alone, so that the e^x of a far-off token cannot meet its own cancelling gradient as inf - inf: near 0
    # by expm1, elsewhere as ref / pi_old, which stays finite where e^x does not.
    fixed = x.detach()
    far = fixed.abs() > 1
    near = weight * (torch.expm1(torch.where(far, 0.0, fixed)) - fixed)
    direct = (fixed + log_ratio.detach()).clamp(max=MAX_LOG_RATIO).exp() - weight * (fixed + 1)
    return torch.where(far, direct, near) + quadratic - quadratic.detach()


def aggregate(
    losses: Tensor, weights: Tensor, mask: Tensor, data: LossData, aggregation: str, max_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """The sum and its normaliser.

    "token": over all tokens, by their number; "sequence": of the means over each sequence, by the number of sequences;
    "constant": over all tokens, by sequences times `max_tokens` (arXiv 2503.20783). A sequence without a trained token
    does not count.
    """
    if aggregation == "token":
        return (weights * losses).sum(), weights.sum()
    lengths = segment_sums(weights, data)  # (S,)
    sequences = (segment_sums(mask.to(losses.dtype), data) > 0).to(losses.dtype).sum()
    if aggregation == "constant":
        return (weights * losses).sum(), sequences * max_tokens
    lengths = torch.where(lengths != 0, lengths, 1.0)
    return (weights / lengths[data.segments] * losses).sum(), sequences


def grpo(
    out: LossInputs,
    data: LossData,
    *,
    clip_low: float | None,
    clip_high: float | None,
    aggregation: str,
    max_tokens: int | None,
    beta: float,
    kl_estimator: str,
    old_logprobs: str,
    max_importance_ratio: float | None,
) -> LossTerms:
    """Clipped surrogate plus ``beta`` times an estimate of KL(pi || ref), Eq. 3 of arXiv 2402.03300.

    The fields hold ``weights``, the sampler's ``logprobs`` and ``advantages``, one value a token. See `policy_terms`
    for the ratio, `kl_to_reference` for the estimators and `aggregate` for the normaliser.

    Metrics:
        clip_fraction_low, clip_fraction_high, ratio_mean, ratio_max, approx_kl (to the old policy), entropy, kl (to the
        reference, when beta > 0), completion_length (trained tokens); logprob_gap_mean and logprob_gap_max,
        ``|log pi - log pi_sampler|`` over tokens sampled by the present weights; importance_ratio_mean and _max.
    """
    weights, mask = weights_and_mask(data, out.logprobs)
    losses, log_ratio, metrics = policy_terms(
        out,
        data,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        old_logprobs=old_logprobs,
        max_importance_ratio=max_importance_ratio,
    )
    if beta:
        reference = out.reference_logprobs.to(out.logprobs.dtype)
        kl = kl_to_reference(out.logprobs, reference, log_ratio, mask, kl_estimator)
        losses = losses + beta * kl
        metrics["kl"] = mean_over(kl, mask)
    metrics["completion_length"] = sequence_length(mask, data, out.logprobs)
    total, weight = aggregate(losses, weights, mask, data, aggregation, max_tokens)
    return LossTerms(total, weight, metrics)


def sequence_length(mask: Tensor, data: LossData, like: Tensor) -> Metric:
    """Trained tokens of the sequences that have any."""
    lengths = segment_sums(mask.to(like.dtype), data)
    return mean_over(lengths, lengths > 0)


def needs_grpo(options: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"entropy", "reference"}) if options["beta"] else frozenset({"entropy"})


def check_surrogate(options: Mapping[str, Any]) -> None:
    """The options that `policy_terms` reads."""
    if options["clip_low"] is not None:
        check_number(options, "clip_low", low=0.0, high=1.0)
    if options["clip_high"] is not None:
        check_number(options, "clip_high", low=0.0)
    check_choice(options, "old_logprobs", OLD_LOGPROBS)
    if options["max_importance_ratio"] is None:
        return
    check_number(options, "max_importance_ratio", above=0.0)
    clipped = options["clip_low"] is not None or options["clip_high"] is not None
    if clipped and options["old_logprobs"] == "sampler":
        raise UsageError(
            "max_importance_ratio cannot be used with old_logprobs='sampler' and a clip: both would bound the same "
            "ratio; give old_logprobs='trainer', or clip_low=None, clip_high=None"
        )


def check_grpo(options: Mapping[str, Any]) -> None:
    check_surrogate(options)
    check_choice(options, "aggregation", AGGREGATIONS)
    check_choice(options, "kl_estimator", KL_ESTIMATORS)
    check_choice(options, "scale_rewards", ("group", "batch", "none"))
    check_number(options, "beta", low=0.0)
    constant_length = options["aggregation"] == "constant"
    if constant_length and options["max_tokens"] is None:
        raise UsageError("aggregation='constant' divides by a fixed length: give max_tokens=, the sampler's max_tokens")
    if not constant_length and options["max_tokens"] is not None:
        raise UsageError(
            f"max_tokens is only read by aggregation='constant', not by {options['aggregation']!r}; leave it out"
        )
    if constant_length:
        check_number(options, "max_tokens", low=1)
        if int(options["max_tokens"]) != options["max_tokens"]:
            raise UsageError(f"max_tokens must be a whole number, got {options['max_tokens']!r}")


def _policy_inputs(out: LossInputs, data: LossData) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, mask = weights_and_mask(data, out.logprobs)
    sampler = constant(data, "logprobs", out.logprobs, mask)
    ratio, log_ratio = importance_ratio(out.logprobs, sampler, mask)
    return weights, mask, constant(data, "advantages", out.logprobs, mask), ratio, log_ratio


def _summed(losses: Tensor, weights: Tensor, metrics: dict[str, Metric]) -> LossTerms:
    total = (weights * losses).sum()
    return LossTerms(total, 1.0, {"loss:sum": Sum(total.detach()), **metrics})


def importance_sampling(out: LossInputs, data: LossData, *, max_importance_ratio: float | None) -> LossTerms:
    """Tinker's importance_sampling: ``-sum_i r_i A_i``, ``r = pi / pi_sampler``, divisor 1.

    With ``max_importance_ratio=C`` the ratio is the constant weight ``min(r, C)`` of the policy gradient instead.
    """
    weights, mask, advantages, ratio, log_ratio = _policy_inputs(out, data)
    metrics = ratio_metrics(ratio, log_ratio, advantages, mask, None, None)
    if max_importance_ratio is None:
        return _summed(-ratio * advantages, weights, metrics)
    logprobs = torch.where(mask, out.logprobs, 0.0)
    return _summed(truncated_surrogate(logprobs, ratio, advantages, max_importance_ratio), weights, metrics)


def ppo(out: LossInputs, data: LossData, *, clip_low_threshold: float, clip_high_threshold: float) -> LossTerms:
    """Tinker's ppo: ``-sum_i min(r A, clip(r, low, high) A)`` (Eq. 7 of arXiv 1707.06347), divisor 1."""
    weights, mask, advantages, ratio, log_ratio = _policy_inputs(out, data)
    losses = clipped_surrogate(ratio, advantages, clip_low_threshold, clip_high_threshold)
    metrics = ratio_metrics(ratio, log_ratio, advantages, mask, clip_low_threshold, clip_high_threshold)
    return _summed(losses, weights, metrics)


def cispo(out: LossInputs, data: LossData, *, clip_low_threshold: float, clip_high_threshold: float) -> LossTerms:
    """Tinker's cispo: ``-sum_i clip(r, low, high) A log pi``, the clipped r a constant (Eq. 4 of arXiv 2506.13585)."""
    weights, mask, advantages, ratio, log_ratio = _policy_inputs(out, data)
    weight = ratio.detach().clamp(clip_low_threshold, clip_high_threshold)
    losses = -weight * advantages * torch.where(mask, out.logprobs, 0.0)
    metrics = ratio_metrics(ratio, log_ratio, advantages, mask, None, None)
    outside = (ratio < clip_low_threshold) | (ratio > clip_high_threshold)
    metrics["clip_fraction"] = mean_over(outside.to(ratio.dtype), mask)
    return _summed(losses, weights, metrics)


def dro(out: LossInputs, data: LossData, *, beta: float) -> LossTerms:
    """Tinker's dro: ``-sum_i (A log pi - beta / 2 (log pi - log pi_sampler)^2)`` (arXiv 2405.19107), divisor 1."""
    weights, mask, advantages, ratio, log_ratio = _policy_inputs(out, data)
    logprobs = torch.where(mask, out.logprobs, 0.0)
    # The penalty wants the difference itself, however large; only exp() of it is bounded.
    difference = torch.where(mask, out.logprobs - constant(data, "logprobs", logprobs, mask), 0.0)
    losses = -(advantages * logprobs - 0.5 * beta * difference**2)
    return _summed(losses, weights, ratio_metrics(ratio, log_ratio, advantages, mask, None, None))


def check_importance_sampling(options: Mapping[str, Any]) -> None:
    if options["max_importance_ratio"] is not None:
        check_number(options, "max_importance_ratio", above=0.0)


def check_thresholds(options: Mapping[str, Any]) -> None:
    """Tinker's thresholds bound the ratio itself: 0.8 and 1.2, not 0.2 and 0.2."""
    check_number(options, "clip_low_threshold", low=0.0)
    check_number(options, "clip_high_threshold", low=0.0)
    if options["clip_low_threshold"] > options["clip_high_threshold"]:
        raise UsageError(
            f"clip_low_threshold={options['clip_low_threshold']!r} is above "
            f"clip_high_threshold={options['clip_high_threshold']!r}; both bound the ratio itself, e.g. 0.8 and 1.2"
        )


def check_dro(options: Mapping[str, Any]) -> None:
    check_number(options, "beta", low=0.0)
