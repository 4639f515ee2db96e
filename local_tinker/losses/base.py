"""What every loss takes and gives, and how its metrics combine over micro-batches.

Shapes: N packed tokens of a micro-batch, K targets a token, S sequences (datums), P preference pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import is_number
from ..errors import UsageError
from ..keywords import hint

# An importance ratio is exp(difference of log-probs). Near e^88 it would overflow fp32 and turn the zero gradient of a
# clipped token into 0 * inf = NaN, so it stops growing at e^60; `ratio_max` shows it.
MAX_LOG_RATIO = 60.0


@dataclass(frozen=True)
class LossInputs:
    """What the model made of a micro-batch.

    Args:
        logprobs: (N,) or (N, K) log-prob of each target token, with gradient.
        entropy: (N,) of the predictive distribution, without gradient.
        values: (N,) of the value head, with gradient.
        reference_logprobs: (N,) of the reference model, without gradient.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True)
class LossData:
    """The constants of a micro-batch, packed like `LossInputs`.

    Args:
        fields: name -> (N,) or (N, K): ``weights``, ``logprobs`` (the sampler's), ``old_logprobs`` (the trainer's at
            the first pass), ``own_version`` (1 where the present weights sampled the completion), ``advantages``,
            ``returns``, ``old_values``.
        segments: (N,) int64, the datum each token belongs to, in 0..n_segments-1.
        n_segments: S.
        pairs: (P, 2) int64, segment of the chosen and of the rejected answer.
    """

    fields: Mapping[str, Tensor]
    segments: Tensor
    n_segments: int
    pairs: Tensor | None = None


class Mean(NamedTuple):
    """A mean over tokens, sequences or pairs, as the two sums it is made of."""

    sum: Tensor | float
    count: Tensor | float


@dataclass(frozen=True)
class Max:
    """The largest value seen; -inf where nothing was."""

    value: Tensor


@dataclass(frozen=True)
class Sum:
    """A total over the call."""

    value: Tensor


Metric = Mean | Max | Sum


@dataclass(frozen=True)
class LossTerms:
    """A loss over one micro-batch.

    Args:
        total: scalar sum, with gradient.
        weight: this micro-batch's part of the normaliser; 1.0 where `LossSpec.normaliser` is "none".
        metrics: name -> `Mean`, `Max` or `Sum`.
    """

    total: Tensor
    weight: Tensor | float
    metrics: dict[str, Metric] = field(default_factory=dict)


def _nothing(_options: Mapping[str, Any]) -> frozenset[str]:
    return frozenset()


def _no_check(_options: Mapping[str, Any]) -> None:
    return None


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


@dataclass(frozen=True)
class LossSpec:
    """A loss and what the engine has to bring for it.

    Args:
        name: its key in `LOSSES`.
        fn: ``fn(out, data, **options) -> LossTerms``, pure.
        defaults: options of `fn` with their defaults; `REQUIRED` where there is none.
        estimator: options read before the batch is cut (advantages), never passed to `fn`.
        normaliser: "weight": the window's sum is divided by its total weight at the optimiser step; "none": by 1.
        needs: from the options of `fn`, which of "entropy", "values" and "reference" `LossInputs` must hold.
        required_fields: the `loss_fn_inputs` a datum must have.
        rows: "weighted": log-probs are only needed where the weight is not 0; "all": everywhere.
        check: raises UsageError for values of the options that cannot be meant.
        internal: not to be named by users.
        label: what messages call it, when not by its name.
    """

    name: str
    fn: Callable[..., LossTerms]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    estimator: Mapping[str, Any] = field(default_factory=dict)
    normaliser: str = "weight"
    needs: Callable[[Mapping[str, Any]], frozenset[str]] = _nothing
    required_fields: tuple[str, ...] = ("target_tokens", "weights")
    rows: str = "weighted"
    check: Callable[[Mapping[str, Any]], None] = _no_check
    internal: bool = False
    label: str | None = None


def check_options(spec: LossSpec, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every option of a loss with its value: those of `spec.fn`, and those of its estimator.

    Raises:
        UsageError: an unknown name (with the nearest known one), a missing required option, a value out of range.
    """
    known, label = {**spec.defaults, **spec.estimator}, spec.label or repr(spec.name)
    for name in options:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise UsageError(f"{label} has no option {name!r}{hint(name, known)} (its options: {allowed})")
    merged = {**known, **options}
    missing = [name for name, value in merged.items() if value is REQUIRED]
    if missing:
        raise UsageError(f"{label} needs {missing[0]}=: it has no default; give a number, e.g. {missing[0]}=0.05")
    spec.check(merged)
    return {k: merged[k] for k in spec.defaults}, {k: merged[k] for k in spec.estimator}


def check_number(
    options: Mapping[str, Any], name: str, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf
) -> None:
    """The option is a finite real number in [low, high] and greater than `above`."""
    value = options[name]
    if not is_number(value) or not math.isfinite(value) or value < low or value <= above or value > high:
        limits = [f"> {above:g}"] if above > -math.inf else [f">= {low:g}"] if low > -math.inf else []
        limits += [f"<= {high:g}"] if high < math.inf else []
        raise UsageError(f"{name} must be a finite number{' ' if limits else ''}{' and '.join(limits)}, got {value!r}")


def check_choice(options: Mapping[str, Any], name: str, allowed: Sequence[Any]) -> None:
    """The option is one of `allowed`."""
    if options[name] not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {options[name]!r}")


def constant(data: LossData, name: str, like: Tensor, mask: Tensor | None = None) -> Tensor:
    """A field in the type of `like`, 0 where `mask` is False, so that what stands in untrained cells cannot leak."""
    values = data.fields[name].to(like.dtype)
    return values if mask is None else torch.where(mask, values, 0.0)


def weights_and_mask(data: LossData, like: Tensor) -> tuple[Tensor, Tensor]:
    """The weights, 1 everywhere when none were given, and where they are not 0."""
    if "weights" not in data.fields:
        return torch.ones_like(like), torch.ones_like(like, dtype=torch.bool)
    weights = data.fields["weights"].to(like.dtype)
    return weights, weights != 0


def segment_sums(values: Tensor, data: LossData) -> Tensor:
    """(N,) -> (S,): the sum over each datum's tokens."""
    return values.new_zeros(data.n_segments).index_add(0, data.segments, values)


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logprobs - old_logprobs) and its logarithm, 1 and 0 where `mask` is False; never above e^60."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(max=MAX_LOG_RATIO)
    return log_ratio.exp(), log_ratio


def mean_over(values: Tensor, mask: Tensor) -> Mean:
    """The mean of `values` where `mask` is True, whatever stands elsewhere."""
    values = values.detach()
    return Mean(torch.where(mask, values, torch.zeros_like(values)).sum(), mask.sum())


def max_over(values: Tensor, mask: Tensor) -> Max:
    """The largest of `values` where `mask` is True."""
    values = values.detach()
    return Max(torch.where(mask, values, torch.full_like(values, -math.inf)).amax())


def combine_metrics(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """The metrics of several micro-batches (or calls) as those of one. Waits for no device."""
    whole: dict[str, Metric] = {}
    for part in parts:
        for name, new in part.items():
            old = whole.get(name)
            whole[name] = new if old is None else _combine(name, old, new)
    return whole


def _combine(name: str, old: Metric, new: Metric) -> Metric:
    assert type(old) is type(new), f"metric {name!r} is {type(old).__name__} here, {type(new).__name__} there"
    if isinstance(new, Mean):
        return Mean(old.sum + new.sum, old.count + new.count)
    if isinstance(new, Sum):
        return Sum(old.value + new.value)
    return Max(torch.maximum(old.value, new.value))


def finish_metrics(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Numbers to show: one wait for the device. A mean or maximum over nothing is left out."""
    if not metrics:
        return {}
    scalars = []
    for metric in metrics.values():
        scalars += list(metric) if isinstance(metric, Mean) else [metric.value, 1.0]
    device = next((s.device for s in scalars if isinstance(s, Tensor)), torch.device("cpu"))
    flat = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=device).detach() for s in scalars]).tolist()
    finished = {}
    for (name, metric), top, bottom in zip(metrics.items(), flat[::2], flat[1::2], strict=True):
        if isinstance(metric, Mean):
            if bottom != 0:
                finished[name] = top / bottom
        elif not (isinstance(metric, Max) and top == -math.inf):
            finished[name] = top
    return finished
