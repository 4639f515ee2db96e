"""Completions and rewards -> what a policy loss reads. GRPO and PPO are estimators here plus losses in `losses/`.

Shapes: T tokens after the prompt of one rollout, N input positions of its datum (prompt + T - 1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .advantages import flatten_rewards, gae, group_advantages, penalise_kl, place_scores, whiten
from .data.datum import rollout
from .engine.base import LossCall, Scores, Unit
from .errors import UsageError
from .losses import LOSSES
from .losses.base import check_options
from .types import Completion, Datum, ModelInput, Rollout

REMEMBERED = 65_536  # rollouts whose fixed values are kept; past it the oldest go

Score = Callable[..., Scores]  # score(units, *, values=, reference=)


@dataclass(frozen=True)
class RolloutCall:
    """A call over rollouts and the metrics its estimator adds."""

    call: LossCall
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class RolloutMemory:
    """What was fixed for rollouts by their id: the trainer's first log-probs, PPO's old values and advantages."""

    old_logprobs: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict)
    fixed: OrderedDict[str, dict[str, np.ndarray]] = field(default_factory=OrderedDict)

    def keep(self, table: OrderedDict, id: str, value: Any) -> None:
        table[id] = value
        while len(table) > REMEMBERED:
            table.popitem(last=False)


def check_rollouts(rollouts: Sequence[Any], *, base: str) -> list[Completion | Rollout]:
    """Completions or rollouts of this base model.

    Raises:
        UsageError: naming the index: plain text (its tokens and log-probs are gone), or another model's completion.
    """
    for i, item in enumerate(rollouts):
        if not isinstance(item, (Completion, Rollout)):
            what = (
                "a plain str: its tokens and log-probs are gone"
                if isinstance(item, str)
                else f"a {type(item).__name__}"
            )
            raise UsageError(
                f"completion {i} is {what}; pass what sample or sample_batch returned (string methods such as strip() return "
                "plain text), or a Rollout"
            )
        made_by, _, rest = item.weights_version.partition("/")
        if rest and len(made_by) == len(base) and made_by != base:
            raise UsageError(f"completion {i} was sampled from another base model ({made_by}, this one is {base})")
    return list(rollouts)


def grpo_call(
    completions: Sequence[Any],
    rewards: Sequence[Any],
    options: Mapping[str, Any],
    *,
    base: str,
    version: str,
    score: Score,
    memory: RolloutMemory,
    say: Callable[[str], None],
) -> RolloutCall:
    """Group-relative advantages (arXiv 2402.03300, section 4.1.2) on the clipped surrogate."""
    spec = LOSSES["grpo"]
    chosen, estimator = check_options(spec, options)
    flat = flatten_rewards(completions, rewards, unscorable=True)
    if flat.group_sizes is None:
        raise UsageError(
            "grpo compares completions of one prompt and got a flat list: pass the groups that sample_batch(prompts, n=8) returns"
        )
    rollouts = check_rollouts(flat.completions, base=base)
    edges = np.cumsum([0, *flat.group_sizes])
    groups = [flat.rewards[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    estimated = group_advantages(groups, scale=estimator["scale_rewards"])
    advantages = np.concatenate(estimated.values)
    datums = [rollout(r, advantages=float(a)) for r, a in zip(rollouts, advantages, strict=True)]
    # A completion that could not be scored teaches nothing and counts in no mean.
    datums = [_unweighted(d) if r is None else d for d, r in zip(datums, flat.rewards, strict=True)]
    metrics = {**estimated.metrics, "truncated_fraction": _truncated(rollouts)}
    _explain(metrics, say)
    datums = _with_common_fields(datums, rollouts, chosen, version=version, score=score, memory=memory)
    kept = [d for d in datums if d.loss_fn_inputs["weights"].any()]
    return RolloutCall(LossCall([(d,) for d in kept], spec.name, chosen), metrics)


def ppo_call(
    completions: Sequence[Any],
    rewards: Sequence[Any] | None,
    options: Mapping[str, Any],
    *,
    base: str,
    version: str,
    score: Score,
    memory: RolloutMemory,
    fix: bool,
) -> RolloutCall:
    """PPO (arXiv 1707.06347): GAE over the value head's values, whitened over the call, then surrogate and value loss.

    Args:
        fix: remember old values and advantages of these rollouts, so that later calls on any of them use these.
    """
    spec = LOSSES["ppo_rollout"]
    chosen, estimator = check_options(spec, options)
    if rewards is None:
        flat = [c for item in completions for c in ([item] if _one(item) else item)]
        rollouts = check_rollouts(flat, base=base)
        unknown = [i for i, r in enumerate(rollouts) if r.id not in memory.fixed]
        if unknown:
            raise UsageError(
                f"completion {unknown[0]} has no rewards: pass them, or fix the rollout first with forward(completions, rewards, loss_fn='ppo')"
            )
        metrics: dict[str, float] = {}
    else:
        scored = flatten_rewards(completions, rewards, per_token=True)
        rollouts = check_rollouts(scored.completions, base=base)
        metrics = {"truncated_fraction": _truncated(rollouts)}
        totals = [float(np.sum(r)) for r in scored.rewards]
        metrics |= {
            "reward_mean": float(np.mean(totals)),
            "reward_std": float(np.std(totals, ddof=1)) if len(totals) > 1 else 0.0,
        }
        if fix or any(r.id not in memory.fixed for r in rollouts):
            fixed = _fix(rollouts, scored.rewards, estimator, score)
        else:
            fixed = {r.id: memory.fixed[r.id] for r in rollouts}
        if fix:
            memory.fixed.clear()
            for id, fields in fixed.items():
                memory.keep(memory.fixed, id, fields)
        metrics["value_mean"] = float(np.mean([f["old_values"][f["mask"]].mean() for f in fixed.values()]))
    source = memory.fixed if rewards is None else fixed
    datums = []
    for r in rollouts:
        fields = source[r.id]
        datum = rollout(r)
        extra = {name: fields[name].astype(np.float32) for name in ("advantages", "returns", "old_values")}
        datums.append(replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, **extra}))
    datums = _with_common_fields(datums, rollouts, chosen, version=version, score=score, memory=memory)
    return RolloutCall(LossCall([(d,) for d in datums], "ppo_rollout", chosen), metrics)


def _fix(
    rollouts: Sequence[Any], rewards: Sequence[Any], estimator: Mapping[str, Any], score: Score
) -> dict[str, dict[str, np.ndarray]]:
    """Old values, advantages (whitened over these rollouts) and returns, each (N,), by rollout id."""
    with_reference = estimator["beta"] > 0
    scores = score([(_scoring_datum(r),) for r in rollouts], values=True, reference=with_reference)
    placed = place_scores(rewards, [r.trained for r in rollouts])
    advantages, returns, olds, masks = [], [], [], []
    for i, r in enumerate(rollouts):
        start = len(r.prompt_tokens) - 1
        values = scores.values[i].astype(np.float64)
        per_token = placed[i]
        if with_reference:
            per_token = penalise_kl(
                per_token,
                scores.logprobs[i][start:-1],
                scores.reference_logprobs[i][start:-1],
                trained=r.trained,
                beta=estimator["beta"],
            )
        found = gae(
            per_token,
            values[start:-1],
            trained=r.trained,
            terminal=r.stop_reason == "stop",
            bootstrap_value=float(values[-1]),
            gamma=estimator["gamma"],
            gae_lambda=estimator["gae_lambda"],
        )
        before = np.zeros(start)
        advantages.append(np.concatenate([before, found[0]]))
        returns.append(np.concatenate([before, found[1]]))
        masks.append(np.concatenate([before.astype(bool), np.asarray(r.trained, bool)]))
        olds.append(np.where(masks[-1], values[:-1], 0.0))
    whitened = whiten(advantages, masks)
    return {
        r.id: {"advantages": a, "returns": ret, "old_values": v, "mask": m}
        for r, a, ret, v, m in zip(rollouts, whitened, returns, olds, masks, strict=True)
    }


def _scoring_datum(r: Completion | Rollout) -> Datum:
    """The rollout with its last token as input too: the value there is what follows a rollout that was cut."""
    datum = rollout(r)
    tokens = [*datum.model_input.to_ints(), r.tokens[-1]]
    targets = np.append(datum.loss_fn_inputs["target_tokens"], r.tokens[-1])  # the appended target is never read
    return Datum(
        ModelInput.from_ints(tokens),
        {"target_tokens": targets, "weights": np.append(datum.loss_fn_inputs["weights"], 1.0)},
        datum.source,
    )


def _with_common_fields(
    datums: list[Datum],
    rollouts: Sequence[Any],
    options: Mapping[str, Any],
    *,
    version: str,
    score: Score,
    memory: RolloutMemory,
) -> list[Datum]:
    """Add `own_version`, and `old_logprobs` where the trainer's own first log-probs are asked for."""
    own = [float(r.weights_version == version) for r in rollouts]
    datums = [_add(d, own_version=np.full(d.length, o, np.float32)) for d, o in zip(datums, own, strict=True)]
    if options["old_logprobs"] != "trainer":
        return datums
    unseen = [
        i
        for i, r in enumerate(rollouts)
        if r.id not in memory.old_logprobs and datums[i].loss_fn_inputs["weights"].any()
    ]
    if unseen:
        scores = score([(datums[i],) for i in unseen])
        for i, logprobs in zip(unseen, scores.logprobs, strict=True):
            memory.keep(memory.old_logprobs, rollouts[i].id, logprobs)
    zeros = {i: np.zeros(d.length, np.float32) for i, d in enumerate(datums)}
    return [
        _add(d, old_logprobs=memory.old_logprobs.get(r.id, zeros[i]))
        for i, (d, r) in enumerate(zip(datums, rollouts, strict=True))
    ]


def policy_units(rollouts: Sequence[Any], rewards: Sequence[Any], *, base: str) -> list[Unit]:
    """Rollouts with one advantage each (or one a token) for Tinker's policy losses, taken as given."""
    flat = flatten_rewards(rollouts, rewards, per_token=True)
    checked = check_rollouts(flat.completions, base=base)
    return [(rollout(r, advantages=a),) for r, a in zip(checked, flat.rewards, strict=True)]


def _add(datum: Datum, **fields: np.ndarray) -> Datum:
    return replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, **fields})


def _unweighted(datum: Datum) -> Datum:
    return _add(datum, weights=np.zeros_like(datum.loss_fn_inputs["weights"]))


def _one(item: Any) -> bool:
    return isinstance(item, (str, Rollout))


def _truncated(rollouts: Sequence[Any]) -> float:
    return float(np.mean([r.stop_reason == "length" for r in rollouts]))


def _explain(metrics: Mapping[str, float], say: Callable[[str], None]) -> None:
    """When nothing can be learned, say why."""
    if metrics["flat_group_fraction"] == 1.0:
        say(
            "every group has equal rewards, so all advantages are 0 and nothing is learned: the task may be too hard or too easy, "
            "the temperature too low, the reward function constant, or the answers cut before the part it scores (max_tokens)"
        )
    if metrics["truncated_fraction"] == 1.0:
        say(
            "every completion was cut by max_tokens: raise max_tokens, or check that the model's stop token can be reached"
        )
