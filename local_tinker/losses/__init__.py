"""Losses by name. A new one is a function in this package and its line in `LOSSES`."""

from __future__ import annotations

import difflib

from ..errors import UsageError
from .base import (
    REQUIRED,
    LossData,
    LossInputs,
    LossSpec,
    LossTerms,
    Max,
    Mean,
    Sum,
    check_options,
    combine_metrics,
    finish_metrics,
)
from .policy import (
    check_dro,
    check_grpo,
    check_importance_sampling,
    check_thresholds,
    cispo,
    dro,
    grpo,
    importance_sampling,
    needs_grpo,
    ppo,
)
from .preference import check_dpo, dpo, needs_dpo
from .supervised import cross_entropy, linear, sft
from .value import check_ppo_rollout, needs_ppo_rollout, ppo_rollout

_ROLLOUT_FIELDS = ("target_tokens", "weights", "logprobs", "advantages")
_POLICY_FIELDS = ("target_tokens", "logprobs", "advantages")
_SURROGATE = {"clip_low": 0.2, "clip_high": 0.2, "old_logprobs": "sampler", "max_importance_ratio": None}
_GRPO = {**_SURROGATE, "aggregation": "token", "max_tokens": None, "beta": 0.0, "kl_estimator": "k3"}
_DPO = {"beta": 0.1, "label_smoothing": 0.0, "variant": "sigmoid", "reference_free": False}
_PPO = {**_SURROGATE, "value_clip": 0.2, "value_coefficient": 0.5}

LOSSES: dict[str, LossSpec] = {
    "sft": LossSpec("sft", sft),
    "dpo": LossSpec("dpo", dpo, defaults=_DPO, needs=needs_dpo, check=check_dpo),
    "grpo": LossSpec(
        "grpo",
        grpo,
        defaults=_GRPO,
        estimator={"scale_rewards": "group"},
        needs=needs_grpo,
        required_fields=_ROLLOUT_FIELDS,
        check=check_grpo,
    ),
    "ppo_rollout": LossSpec(
        "ppo_rollout",
        ppo_rollout,
        defaults=_PPO,
        estimator={"gamma": 1.0, "gae_lambda": 0.95, "beta": 0.0},
        needs=needs_ppo_rollout,
        required_fields=(*_ROLLOUT_FIELDS, "returns", "old_values"),
        check=check_ppo_rollout,
        internal=True,
        label="'ppo' on completions",
    ),
    "cross_entropy": LossSpec("cross_entropy", cross_entropy, normaliser="none", rows="all"),
    "importance_sampling": LossSpec(
        "importance_sampling",
        importance_sampling,
        defaults={"max_importance_ratio": None},
        normaliser="none",
        required_fields=_POLICY_FIELDS,
        rows="all",
        check=check_importance_sampling,
    ),
    "ppo": LossSpec(
        "ppo",
        ppo,
        defaults={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        normaliser="none",
        required_fields=_POLICY_FIELDS,
        rows="all",
        check=check_thresholds,
    ),
    "cispo": LossSpec(
        "cispo",
        cispo,
        defaults={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
        normaliser="none",
        required_fields=_POLICY_FIELDS,
        rows="all",
        check=check_thresholds,
    ),
    "dro": LossSpec(
        "dro",
        dro,
        defaults={"beta": REQUIRED},
        normaliser="none",
        required_fields=_POLICY_FIELDS,
        rows="all",
        check=check_dro,
    ),
    "linear": LossSpec("linear", linear, normaliser="none", internal=True),
}

_OWN = "write it with forward_backward_custom"
# Names from the field that we lack, with what to use instead.
MISSING_LOSSES: dict[str, str] = {
    "bco": f"use 'dpo', or {_OWN}",
    "bnpo": "use 'grpo' with aggregation='token'",
    "cpo": f"use 'dpo' with reference_free=True, or {_OWN}",
    "custom": "call forward_backward_custom(batch, fn)",
    "dapo": "use 'grpo' with aggregation='token', clip_high=0.28",
    "distillation": "use 'importance_sampling' with the teacher's log-prob differences as advantages",
    "dr_grpo": "use 'grpo' with aggregation='constant', max_tokens=..., scale_rewards='none'",
    "gkd": f"use 'importance_sampling' with the teacher's log-prob differences as advantages, or {_OWN}",
    "gspo": f"use 'grpo' with aggregation='sequence' (the ratio stays per token), or {_OWN}",
    "ipo": "use 'dpo' with variant='ipo'",
    "kto": "use 'dpo' on pairs, or 'importance_sampling' with advantages from the labels",
    "mse": _OWN,
    "nll": "use 'sft' (a mean over tokens) or 'cross_entropy' (a sum)",
    "online_dpo": "sample, rank and pass rows with prompt, chosen, rejected to 'dpo'",
    "orpo": f"use 'dpo' with reference_free=True, or {_OWN}",
    "reinforce": "use 'importance_sampling'",
    "reward": "reward models are not trained here; use 'dpo' on the same pairs",
    "rloo": "use 'grpo' with scale_rewards='none'",
    "sapo": f"use 'grpo', or {_OWN}",
    "simpo": f"use 'dpo' with reference_free=True, or {_OWN}",
    "stable_reinforce": f"use 'importance_sampling', or {_OWN}",
    "vespo": f"use 'grpo', or {_OWN}",
    "xpo": f"use 'dpo', or {_OWN}",
}


def find_loss(name: str) -> LossSpec:
    """The loss a user named.

    Raises:
        UsageError: an unknown name, with the nearest one; a known name that we lack, with what to use instead.
    """
    spec = LOSSES.get(name) if isinstance(name, str) else None
    if spec is not None and not spec.internal:
        return spec
    public = [known for known, each in LOSSES.items() if not each.internal]
    listed = ", ".join(public)
    if spec is not None:
        raise UsageError(f"loss_fn {name!r} is internal; the losses are {listed}")
    key = str(name).lower().replace("-", "_")
    if key in MISSING_LOSSES:
        raise UsageError(f"loss_fn {name!r} is not among our losses: {MISSING_LOSSES[key]} (the losses are {listed})")
    near = difflib.get_close_matches(key, public, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown loss_fn {name!r}{hint} (the losses are {listed})")


__all__ = [
    "LOSSES",
    "MISSING_LOSSES",
    "REQUIRED",
    "LossData",
    "LossInputs",
    "LossSpec",
    "LossTerms",
    "Max",
    "Mean",
    "Sum",
    "check_options",
    "combine_metrics",
    "find_loss",
    "finish_metrics",
]
