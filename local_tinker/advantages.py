"""From rewards to advantages: float64 on the host, taken over a whole call before it is cut into micro-batches.

Shapes: P prompts, G completions a prompt (groups may differ in size), N tokens of one rollout.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UsageError

SCALES = ("group", "batch", "none")
# Keeps a group of nearly equal rewards from being blown up; the constant of the reference implementations.
STD_EPSILON = 1e-4


@dataclass(frozen=True, eq=False)
class FlatRewards:
    """Completions and rewards one to one.

    Args:
        completions: every completion, group after group.
        rewards: a float each; None where unscorable; (N,) float64 where the user gave one a token.
        group_sizes: completions a group, or None when the completions were not grouped.
    """

    completions: list[Any]
    rewards: list[float | None | np.ndarray]
    group_sizes: list[int] | None

    def nested(self) -> list[list[float | None | np.ndarray]]:
        """The rewards as groups."""
        assert self.group_sizes is not None, "these completions were not grouped"
        ends = np.cumsum(self.group_sizes)
        return [self.rewards[end - size : end] for end, size in zip(ends, self.group_sizes, strict=True)]


@dataclass(frozen=True, eq=False)
class GroupAdvantages:
    """Advantages of groups, and what there was to learn from.

    Args:
        values: one (G,) array a group.
        metrics: ``reward_mean`` and ``reward_std`` (unbiased, over the call), ``flat_group_fraction`` (groups whose
            rewards are all equal teach nothing), ``unscorable_fraction``.
    """

    values: list[np.ndarray]
    metrics: dict[str, float]


def _is_one(completion: Any) -> bool:
    """A string or a rollout, not a group of them."""
    return isinstance(completion, str) or hasattr(completion, "tokens")


def _as_list(name: str, value: Any) -> list:
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        value = value.tolist()
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Sequence):
        raise UsageError(f"{name} must be a list, got {type(value).__name__}")
    return list(value)


def check_reward(value: Any, where: str, *, unscorable: bool = False) -> float | None:
    """A reward as a float.

    Args:
        where: what messages call it, e.g. ``rewards[3][5]``.
        unscorable: whether None is allowed; it is returned as it is.

    Raises:
        UsageError: not a finite real number (NaN, inf, None, bool, str, a tensor with a shape).
    """
    if value is None:
        if unscorable:
            return None
        raise UsageError(f"{where} is None: a reward is a number (does the reward function return on every path?)")
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "item"):
        if tuple(shape) != ():
            raise UsageError(f"{where} has shape {tuple(shape)}: a reward is one number, not an array; index it")
        value = value.item()
    if isinstance(value, bool):
        raise UsageError(f"{where} is {value} (a bool): return a number, e.g. float(...)")
    if not isinstance(value, numbers.Real):
        raise UsageError(f"{where} is {value!r} ({type(value).__name__}): a reward is a number")
    value = float(value)
    if not math.isfinite(value):
        raise UsageError(f"{where} is {value}: a reward must be finite")
    return value


def flatten_rewards(
    completions: Sequence[Any], rewards: Sequence[Any], *, per_token: bool = False, unscorable: bool = False
) -> FlatRewards:
    """Match rewards, nested like the completions or flat, to completions, grouped (one list a prompt) or flat.

    Args:
        per_token: also accept a list of N rewards, one a token, for a completion of N tokens.
        unscorable: also accept None for a completion.

    Raises:
        UsageError: counts that do not match, or a reward that is no finite number, with its index.
    """
    groups = _as_list("completions", completions)
    rewards = _as_list("rewards", rewards)
    if not groups:
        raise UsageError("got no completions")
    grouped = [not _is_one(group) for group in groups]
    if any(grouped) and not all(grouped):
        odd = grouped.index(not grouped[0])
        raise UsageError(
            f"completions[0] is {'a group' if grouped[0] else 'one completion'}, completions[{odd}] is not"
        )
    if not grouped[0]:
        if len(rewards) != len(groups):
            raise UsageError(f"got {len(rewards)} rewards for {len(groups)} completions: give one for each")
        names = [f"rewards[{i}]" for i in range(len(groups))]
        checked = [_reward(r, c, n, per_token, unscorable) for r, c, n in zip(rewards, groups, names, strict=True)]
        return FlatRewards(groups, checked, None)

    groups = [_as_list(f"completions[{i}]", group) for i, group in enumerate(groups)]
    for i, group in enumerate(groups):
        for j, completion in enumerate(group):
            if not _is_one(completion):
                raise UsageError(f"completions[{i}][{j}] is {type(completion).__name__}, not a completion")
    sizes = [len(group) for group in groups]
    flat, names = _match(sizes, rewards)
    every = [completion for group in groups for completion in group]
    checked = [_reward(r, c, n, per_token, unscorable) for r, c, n in zip(flat, every, names, strict=True)]
    return FlatRewards(every, checked, sizes)


def _match(sizes: list[int], rewards: list) -> tuple[list, list[str]]:
    """Rewards of P groups in order, with what messages call each."""
    total, listed = sum(sizes), [_is_list(reward) for reward in rewards]
    nested = all(listed) and len(rewards) == len(sizes) and len(rewards) > 0
    if nested:
        inner = [_as_list(f"rewards[{i}]", group) for i, group in enumerate(rewards)]
        wrong = next((i for i, size in enumerate(sizes) if len(inner[i]) != size), None)
        if wrong is None:
            names = [f"rewards[{i}][{j}]" for i, size in enumerate(sizes) for j in range(size)]
            return [reward for group in inner for reward in group], names
        if len(rewards) != total:
            raise UsageError(
                f"rewards[{wrong}] has {len(inner[wrong])} rewards for a group of {sizes[wrong]} completions"
            )
    if len(rewards) == total:
        return rewards, [f"rewards[{i}]" for i in range(total)]
    shape = f"{len(sizes)} groups of {_sizes(sizes)} completions"
    if len(rewards) == len(sizes) and not any(listed):
        raise UsageError(
            f"got {len(rewards)} rewards for {shape}: reward_fn was given a group; wrap it in local_tinker.reward, "
            "or score [[f(p, c) for c in g] for p, g in zip(prompts, groups)]"
        )
    raise UsageError(
        f"got {len(rewards)} {'lists of ' if any(listed) else ''}rewards for {shape}: "
        f"give one reward for each of the {total}, nested like the completions or flat"
    )


def _sizes(sizes: list[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else ", ".join(map(str, sizes))


def _is_list(value: Any) -> bool:
    shape = getattr(value, "shape", None)
    return len(shape) > 0 if shape is not None else isinstance(value, (list, tuple))


def _reward(value: Any, completion: Any, where: str, per_token: bool, unscorable: bool) -> float | None | np.ndarray:
    if not (per_token and _is_list(value)):
        return check_reward(value, where, unscorable=unscorable)
    values = _as_list(where, value)
    length = len(completion.tokens) if hasattr(completion, "tokens") else None
    if length is not None and len(values) != length:
        raise UsageError(f"{where} has {len(values)} rewards for a completion of {length} tokens: give one a token")
    return np.array([check_reward(v, f"{where}[{i}]") for i, v in enumerate(values)], dtype=np.float64)


def group_advantages(rewards: Sequence[Sequence[float | None]], *, scale: str = "group") -> GroupAdvantages:
    """``(r - mean) / (std + 1e-4)``, mean and unbiased std over a group (Sec. 4.1.2 of arXiv 2402.03300).

    Equal rewards give exactly 0. None marks a completion that cannot be scored: its advantage is 0 and it leaves mean
    and std as if it were not there; a group with one scorable completion is all 0.

    Args:
        rewards: one list a prompt.
        scale: "group" divides by the group's std, "batch" by that of all rewards of the call, "none" by nothing
            (arXiv 2503.20783).

    Raises:
        UsageError: no group, a group of one, a reward that is no finite number, nothing scorable at all.
    """
    if scale not in SCALES:
        raise UsageError(f"scale_rewards must be one of {', '.join(map(repr, SCALES))}, got {scale!r}")
    groups = [_as_list(f"rewards[{i}]", group) for i, group in enumerate(_as_list("rewards", rewards))]
    if not groups:
        raise UsageError("got no groups of rewards")
    arrays = []
    for i, group in enumerate(groups):
        if len(group) < 2:
            raise UsageError(
                f"group {i} has {len(group)} completion{'s' * (len(group) != 1)}: an advantage compares completions of "
                "one prompt, so sample at least 2, e.g. sample_batch(prompts, n=8)"
            )
        checked = [check_reward(r, f"rewards[{i}][{j}]", unscorable=True) for j, r in enumerate(group)]
        arrays.append(np.array([math.nan if r is None else r for r in checked], dtype=np.float64))
    scored = np.concatenate(arrays)
    unscorable = float(np.isnan(scored).mean())
    scored = scored[~np.isnan(scored)]
    if not len(scored):
        raise UsageError(
            f"all {sum(map(len, arrays))} rewards are None: does the reward function return on every path?"
        )
    spread = _std(scored)
    values = [_centre(array, scale, spread) for array in arrays]
    metrics = {
        "reward_mean": float(scored.mean()),
        "reward_std": spread,
        "flat_group_fraction": float(np.mean([not value.any() for value in values])),
        "unscorable_fraction": unscorable,
    }
    return GroupAdvantages(values, metrics)


def _std(values: np.ndarray) -> float:
    # Equal values are exactly 0 apart; their mean may be a rounding away from them.
    return float(values.std(ddof=1)) if len(values) > 1 and values.max() != values.min() else 0.0


def _centre(rewards: np.ndarray, scale: str, batch_std: float) -> np.ndarray:
    scorable = ~np.isnan(rewards)
    scored, advantages = rewards[scorable], np.zeros_like(rewards)
    std = _std(scored)
    if std == 0:
        return advantages
    divisor = {"group": std + STD_EPSILON, "batch": batch_std + STD_EPSILON, "none": 1.0}[scale]
    advantages[scorable] = (scored - scored.mean()) / divisor
    return advantages


def place_scores(rewards: Sequence[Any], trained: Sequence[Sequence[bool]]) -> list[np.ndarray]:
    """Rewards of each token (N,): a number goes to the rollout's last trained token, a list of N stays as it is.

    Raises:
        UsageError: wrong counts, no trained token, a reward on a token that the policy did not sample.
    """
    if len(rewards) != len(trained):
        raise UsageError(f"got {len(rewards)} rewards for {len(trained)} rollouts")
    placed = []
    for i, (reward, flags) in enumerate(zip(rewards, trained, strict=True)):
        mask = np.asarray(flags, dtype=bool)
        if not mask.any():
            raise UsageError(f"rollout {i} has no trained token: there is nothing to put its reward on")
        if _is_list(reward):
            values = np.asarray(_as_list(f"rewards[{i}]", reward), dtype=np.float64)
            _check_token_rewards(values, mask, f"rewards[{i}]")
        else:
            values = np.zeros(len(mask))
            values[np.flatnonzero(mask)[-1]] = check_reward(reward, f"rewards[{i}]")
        placed.append(values)
    return placed


def _check_token_rewards(values: np.ndarray, trained: np.ndarray, where: str) -> None:
    if values.shape != trained.shape:
        raise UsageError(f"{where} has {values.size} rewards for {trained.size} tokens: give one a token")
    for i in np.flatnonzero(~np.isfinite(values)):
        raise UsageError(f"{where}[{i}] is {values[i]}: a reward must be finite")
    for i in np.flatnonzero((values != 0) & ~trained):
        raise UsageError(
            f"{where}[{i}] is {values[i]} on a token that the policy did not sample: put it on the sampled token before"
        )


def penalise_kl(
    rewards: np.ndarray, logprobs: np.ndarray, reference_logprobs: np.ndarray, *, trained: Sequence[bool], beta: float
) -> np.ndarray:
    """(N,) ``r_t - beta (log pi_old - log ref)`` on trained tokens: KL to the reference as part of the reward, where
    the plain log-ratio has the right gradient (Eq. 2 of arXiv 2203.02155)."""
    mask = np.asarray(trained, dtype=bool)
    penalty = np.subtract(logprobs, reference_logprobs, where=mask, out=np.zeros(len(mask)), dtype=np.float64)
    return np.asarray(rewards, dtype=np.float64) - beta * penalty


def gae(
    rewards: Sequence[float],
    values: Sequence[float],
    *,
    trained: Sequence[bool],
    terminal: bool,
    bootstrap_value: float = 0.0,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over the sampled tokens of one rollout, Eq. 16 of arXiv 1506.02438.

    ``delta_k = r_k + gamma V_{k+1} - V_k``, ``A_k = delta_k + gamma lambda A_{k+1}``, ``R_k = A_k + V_k``, where k runs
    over trained tokens only: what a tool wrote between two of them takes no time, is no state and has no value.

    Args:
        rewards: (N,) reward received after each token, 0 on untrained ones.
        values: (N,) value of the state each token was sampled in; anything where untrained.
        terminal: True when the rollout ended by itself: nothing follows the last token. False when it was cut: then
            `bootstrap_value`, the value of the state after its last token, stands for what would have.

    Returns:
        advantages and returns, both (N,), 0 where untrained.
    """
    mask = np.asarray(trained, dtype=bool)
    rewards, values = np.asarray(rewards, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not rewards.shape == values.shape == mask.shape:
        raise UsageError(f"got {rewards.size} rewards and {values.size} values for {mask.size} tokens")
    _check_token_rewards(rewards, mask, "rewards")
    if not terminal and not math.isfinite(bootstrap_value):
        raise UsageError(f"bootstrap_value is {bootstrap_value}: a rollout that was cut needs a finite one")
    advantages, returns = np.zeros(len(mask)), np.zeros(len(mask))
    following, carried = (0.0 if terminal else float(bootstrap_value)), 0.0
    for i in np.flatnonzero(mask)[::-1]:
        delta = rewards[i] + gamma * following - values[i]
        carried = delta + gamma * gae_lambda * carried
        advantages[i], returns[i] = carried, carried + values[i]
        following = values[i]
    return advantages, returns


def whiten(advantages: Sequence[np.ndarray], mask: Sequence[Sequence[bool]]) -> list[np.ndarray]:
    """Mean 0 and unbiased variance 1 over the trained tokens of all rollouts together; 0 elsewhere.

    Advantages that are all equal, a single one included, become 0.

    Args:
        advantages: one (N,) array a rollout; anything where `mask` is False.
        mask: the trained tokens of each.
    """
    masks = [np.asarray(flags, dtype=bool) for flags in mask]
    arrays = [np.asarray(values, dtype=np.float64) for values in advantages]
    if [m.shape for m in masks] != [a.shape for a in arrays]:
        raise UsageError(
            f"advantages and mask differ in shape: {[a.shape for a in arrays]}, {[m.shape for m in masks]}"
        )
    real = np.concatenate([a[m] for a, m in zip(arrays, masks, strict=True)]) if arrays else np.zeros(0)
    if not len(real):
        return arrays
    mean, std = real.mean(), _std(real)
    # Below this the spread is the rounding of equal numbers, and dividing by it would make noise of size 1.
    flat = std <= 1e-12 * np.abs(real).max()
    whitened = []
    for values, flags in zip(arrays, masks, strict=True):
        row = np.zeros_like(values)
        if not flat:
            row[flags] = (values[flags] - mean) / std
        whitened.append(row)
    return whitened
