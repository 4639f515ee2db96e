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
class FixedRollout:
    """What PPO fixed for a rollout, and from what: later calls must mean the same.

    Attributes:
        fields: name -> (N,) ``advantages``, ``returns``, ``old_values``. mask: (N,) trained positions.
        rewards: as given. estimator: the options it was estimated with.
    """

    fields: Mapping[str, np.ndarray]
    mask: np.ndarray
    rewards: tuple[float, ...]
    estimator: Mapping[str, Any]


@dataclass
class RolloutMemory:
    """What was fixed for rollouts by their id: the trainer's first log-probs, PPO's old values and advantages."""

    old_logprobs: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict)
    fixed: OrderedDict[str, FixedRollout] = field(default_factory=OrderedDict)

    def remember(self, old_logprobs: Mapping[str, np.ndarray], fixed: Mapping[str, FixedRollout]) -> None:
        """Keep what a call that succeeded has found."""
        for table, found in ((self.old_logprobs, old_logprobs), (self.fixed, fixed)):
            table.update(found)
            while len(table) > REMEMBERED:
                table.popitem(last=False)


@dataclass(frozen=True)
class RolloutCall:
    """A call over rollouts, the metrics its estimator adds, and what to remember once the call has succeeded."""

    call: LossCall
    metrics: Mapping[str, float] = field(default_factory=dict)
    old_logprobs: Mapping[str, np.ndarray] = field(default_factory=dict)
    fixed: Mapping[str, FixedRollout] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """What an objective needs to know of the trainer.

    Attributes:
        base: first characters of the base's fingerprint. version: of the present weights.
        score: log-probs, values and reference log-probs of units.
        fp8: whether the trainer approximates the base that a sampler has as it is.
    """

    base: str
    version: str
    vocab_size: int
    max_length: int
    score: Score
    memory: RolloutMemory
    say: Callable[[str], None]
    fp8: bool

    def take_sampled_logprobs(self) -> None:
        """Called where ratios are to a sampler's log-probs."""
        if self.fp8:
            self.say(
                'compute="fp8": completions were drawn from the base as it is and are trained on an approximation of it, so '
                'ratios to their log-probs are not 1 at the start; old_logprobs="trainer" takes the trainer\'s own where a loss '
                "has it"
            )


def check_rollouts(rollouts: Sequence[Any], policy: Policy) -> list[Completion | Rollout]:
    """Completions or rollouts of this base model.

    Raises:
        UsageError: naming the index: plain text (its tokens and log-probs are gone), another model's completion, ids
            outside the vocabulary, more tokens than fit.
    """
    for i, item in enumerate(rollouts):
        if not isinstance(item, (Completion, Rollout)):
            what = (
                "a plain str: its tokens and log-probs are gone"
                if isinstance(item, str)
                else f"a {type(item).__name__}"
            )
            raise UsageError(
                f"completion {i} is {what}; pass what sample or sample_batch returned (string methods such as strip() "
                "return plain text), or a Rollout"
            )
        made_by, _, rest = item.weights_version.partition("/")
        if rest and len(made_by) == len(policy.base) and made_by != policy.base:
            raise UsageError(
                f"completion {i} was sampled from another base model ({made_by}, this one is {policy.base})"
            )
        ids = (*item.prompt_tokens, *item.tokens)
        if len(ids) > policy.max_length:
            raise UsageError(
                f"completion {i} has {len(ids)} tokens with its prompt, over max_length={policy.max_length}"
            )
        if ids and not 0 <= min(ids) <= max(ids) < policy.vocab_size:
            raise UsageError(
                f"completion {i} holds token id {max(ids)}; the vocabulary has ids 0 to {policy.vocab_size - 1}"
            )
    if any(isinstance(item, Completion) and item.filtered for item in rollouts):
        policy.say(
            "completions were drawn with top_p, top_k or min_p, so from fewer tokens than their log-probs are of: importance "
            "ratios are biased by the mass left out; sample for policy losses without filters"
        )
    return list(rollouts)


def grpo_call(
    completions: Sequence[Any], rewards: Sequence[Any], options: Mapping[str, Any], policy: Policy
) -> RolloutCall:
    """Group-relative advantages (arXiv 2402.03300, section 4.1.2) on the clipped surrogate."""
    chosen, estimator = check_options(LOSSES["grpo"], options)
    flat = flatten_rewards(completions, rewards, unscorable=True)
    if flat.group_sizes is None:
        raise UsageError(
            "grpo compares completions of one prompt and got a flat list: pass the groups that sample_batch(prompts, n=8) "
            "returns"
        )
    rollouts = check_rollouts(flat.completions, policy)
    edges = np.cumsum([0, *flat.group_sizes])
    groups = [flat.rewards[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    estimated = group_advantages(groups, scale=estimator["scale_rewards"])
    advantages = np.concatenate(estimated.values)
    datums = [rollout(r, advantages=float(a)) for r, a in zip(rollouts, advantages, strict=True)]
    # A completion that could not be scored teaches nothing and counts in no mean.
    datums = [_unweighted(d) if r is None else d for d, r in zip(datums, flat.rewards, strict=True)]
    metrics = {**estimated.metrics, "truncated_fraction": _truncated(rollouts)}
    _explain(metrics, policy.say)
    datums, old = _with_common_fields(datums, rollouts, chosen, policy)
    return RolloutCall(LossCall([(d,) for d in datums], "grpo", chosen), metrics, old)


def ppo_call(
    completions: Sequence[Any], rewards: Sequence[Any] | None, options: Mapping[str, Any], policy: Policy, *, fix: bool
) -> RolloutCall:
    """PPO (arXiv 1707.06347): GAE over the value head's values, whitened over the call, then surrogate and value loss.

    Args:
        fix: remember old values and advantages of these rollouts, so that later calls on any of them use these.
    """
    chosen, estimator = check_options(LOSSES["ppo_rollout"], options)
    if rewards is None:
        rollouts = check_rollouts([c for item in completions for c in ([item] if _one(item) else item)], policy)
        unknown = [i for i, r in enumerate(rollouts) if r.id not in policy.memory.fixed]
        if unknown:
            raise UsageError(
                f"completion {unknown[0]} has no rewards: pass them, or fix the rollout first with "
                "forward(completions, rewards, loss_fn='ppo')"
            )
        given: list[tuple[float, ...]] | None = None
    else:
        scored = flatten_rewards(completions, rewards, per_token=True)
        rollouts = check_rollouts(scored.completions, policy)
        given = [tuple(np.atleast_1d(r).astype(float).tolist()) for r in scored.rewards]
    fixed = {} if fix else _already_fixed(rollouts, given, estimator, set(options), policy.memory)
    fresh = not fixed
    if fresh:
        fixed = _fix(rollouts, scored.rewards, given, estimator, policy.score)
    datums = [_with_fixed(rollout(r), fixed[r.id]) for r in rollouts]
    totals = [sum(fixed[r.id].rewards) for r in rollouts]
    metrics = {
        "truncated_fraction": _truncated(rollouts),
        "reward_mean": float(np.mean(totals)),
        "reward_std": float(np.std(totals, ddof=1)) if len(totals) > 1 else 0.0,
        "value_mean": float(np.mean([f.fields["old_values"][f.mask].mean() for f in fixed.values()])),
    }
    datums, old = _with_common_fields(datums, rollouts, chosen, policy)
    return RolloutCall(LossCall([(d,) for d in datums], "ppo_rollout", chosen), metrics, old, fixed if fix else {})


def _already_fixed(
    rollouts: Sequence[Any],
    given: list[tuple[float, ...]] | None,
    estimator: Mapping[str, Any],
    named: set[str],
    memory: RolloutMemory,
) -> dict[str, FixedRollout]:
    """What an earlier `forward` fixed for these rollouts; {} when it fixed none of them."""
    known = [r.id in memory.fixed for r in rollouts]
    if not any(known):
        return {}
    if not all(known):
        raise UsageError(
            f"completion {known.index(True)} was fixed by an earlier forward and completion {known.index(False)} was not: "
            "advantages are whitened together, so pass the one kind or the other"
        )
    fixed = {r.id: memory.fixed[r.id] for r in rollouts}
    for i, r in enumerate(rollouts):
        if given is not None and given[i] != fixed[r.id].rewards:
            raise UsageError(
                f"completion {i} was fixed with other rewards than those given now; call forward again to fix the rollout anew"
            )
        for name in named & estimator.keys():
            if estimator[name] != fixed[r.id].estimator[name]:
                raise UsageError(
                    f"completion {i} was fixed with {name}={fixed[r.id].estimator[name]} and {name}={estimator[name]} is given "
                    "now; call forward again to fix the rollout anew"
                )
    return fixed


def _with_fixed(datum: Datum, fixed: FixedRollout) -> Datum:
    return _add(datum, **{name: values.astype(np.float32) for name, values in fixed.fields.items()})


def _fix(
    rollouts: Sequence[Any],
    rewards: Sequence[Any],
    given: Sequence[tuple[float, ...]],
    estimator: Mapping[str, Any],
    score: Score,
) -> dict[str, FixedRollout]:
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
            own, reference = scores.logprobs[i][start:-1], scores.reference_logprobs[i][start:-1]
            per_token = penalise_kl(per_token, own, reference, trained=r.trained, beta=estimator["beta"])
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
        r.id: FixedRollout({"advantages": a, "returns": ret, "old_values": v}, m, g, dict(estimator))
        for r, a, ret, v, m, g in zip(rollouts, whitened, returns, olds, masks, given, strict=True)
    }


def _scoring_datum(r: Completion | Rollout) -> Datum:
    """The rollout with its last token as input too: the value there is what follows a rollout that was cut."""
    datum = rollout(r)
    inputs = datum.loss_fn_inputs
    longer = {
        "target_tokens": np.append(inputs["target_tokens"], r.tokens[-1]),  # the appended target is never read
        "weights": np.append(inputs["weights"], 1.0),
    }
    return Datum(ModelInput.from_ints([*datum.model_input.to_ints(), r.tokens[-1]]), longer, datum.source)


def _with_common_fields(
    datums: list[Datum], rollouts: Sequence[Any], options: Mapping[str, Any], policy: Policy
) -> tuple[list[Datum], dict[str, np.ndarray]]:
    """Add `own_version`, and `old_logprobs` where the trainer's own first log-probs are asked for; returns those found now."""
    own = [float(r.weights_version == policy.version) for r in rollouts]
    datums = [_add(d, own_version=np.full(d.length, o, np.float32)) for d, o in zip(datums, own, strict=True)]
    if options["old_logprobs"] != "trainer":
        policy.take_sampled_logprobs()
        return datums, {}
    known, found = policy.memory.old_logprobs, {}
    unseen = [i for i, r in enumerate(rollouts) if r.id not in known and datums[i].loss_fn_inputs["weights"].any()]
    if unseen:
        scores = policy.score([(datums[i],) for i in unseen])
        found = {rollouts[i].id: logprobs for i, logprobs in zip(unseen, scores.logprobs, strict=True)}
    old = [
        found.get(r.id, known.get(r.id, np.zeros(d.length, np.float32))) for d, r in zip(datums, rollouts, strict=True)
    ]
    return [_add(d, old_logprobs=o) for d, o in zip(datums, old, strict=True)], found


def policy_units(rollouts: Sequence[Any], advantages: Sequence[Any], policy: Policy) -> list[Unit]:
    """Rollouts with one advantage each (or one a token) for Tinker's policy losses, taken as given."""
    flat = flatten_rewards(rollouts, advantages, per_token=True)
    checked = check_rollouts(flat.completions, policy)
    policy.take_sampled_logprobs()
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
