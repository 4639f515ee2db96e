"""Proximal policy optimisation (arXiv 1707.06347): sampled answers are scored, a value head predicts the score, and
answers that did better than predicted become likelier. The value head is kept inside the training client.

`python -m local_tinker.recipes.ppo --model smollm2-135m --dataset arithmetic`, or `local-tinker run --loss ppo`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hardware import detect
from . import loop, probe, report
from .config import Common, option

if TYPE_CHECKING:
    from ..runs import Run
    from .data import Data


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of a PPO run; rows hold a prompt and what the reward function needs."""

    reward: str = option(
        "number_match", "A verifier's name, or file.py:function.", aliases=("reward_funcs", "reward_fn")
    )
    batch_size: int = option(
        32, "Prompts a rollout, one answer each.", aliases=("train_batch_size", "global_batch_size"), least=1
    )
    max_tokens: int = option(
        512, "Longest answer in tokens.", aliases=("max_completion_length", "max_new_tokens"), least=1
    )
    temperature: float = option(1.0, "Of the sampling.", above=0)
    ppo_epochs: int = option(2, "Passes over a rollout.", aliases=("num_ppo_epochs",), least=1)
    minibatches: int = option(1, "Optimiser steps a pass.", aliases=("num_mini_batches",), least=1)
    clip_low: float = option(0.2, "The ratio is clipped below 1 - clip_low.", aliases=("cliprange",), least=0)
    clip_high: float = option(0.2, "The ratio is clipped above 1 + clip_high.", least=0)
    value_clip: float = option(0.2, "Farthest a value moves from its old one.", aliases=("cliprange_value",), above=0)
    value_coefficient: float = option(0.5, "Weight of the value loss.", aliases=("vf_coef",), least=0)
    value_learning_rate: float = option(1e-3, "Learning rate of the value head.", above=0)
    gamma: float = option(1.0, "Discount a token.", least=0)
    gae_lambda: float = option(0.95, "Bias against variance of the advantages.", aliases=("lam",), least=0)
    beta: float = option(0.0, "Weight of the KL to the base model in the reward.", aliases=("kl_coef",), least=0)

    def options(self) -> dict[str, Any]:
        """Options of the loss and of its estimator."""
        names = ("clip_low", "clip_high", "value_clip", "value_coefficient", "gamma", "gae_lambda", "beta")
        return {name: getattr(self, name) for name in names}


def main(config: Config, *, dry_run: bool = False, resume: Run | None = None) -> Path | None:
    """Train and report; returns the run's folder, or None after a dry run."""
    from .data import check_prompts

    trainer, data = loop.prepare(config, "ppo")
    most = (config.max_length or loop.model_length(config.model)) - config.max_tokens
    data, lines = check_prompts(data, trainer.renderer, most=most, say=report.say)
    print("\n".join(lines), flush=True)
    if dry_run:
        return None
    probe.try_answers(trainer, detect(), data, answers=config.batch_size, max_tokens=config.max_tokens)
    return loop.finish(train(config, trainer, data, resume=resume), max_tokens=config.max_tokens)


def train(config: Config, trainer: Any, data: Data, *, resume: Run | None = None) -> loop.Session:
    """The loop: sample and score a rollout, fix its values and advantages, then several clipped steps over it."""
    from ..rewards import score_batch
    from .data import columns_of, prompt_of
    from .scoring import find_reward, mean_reward

    reward = find_reward(config.reward)

    def evaluate() -> dict[str, float]:
        return {"eval_reward": mean_reward(trainer, reward, data.held_out, max_tokens=config.max_tokens)}

    order = loop.order_of(config, data)
    shown = ("reward_mean",)
    with loop.Session(
        config, trainer, order, data, loss="ppo", resume=resume, evaluate=evaluate, headline=shown, updates=None
    ) as session:
        for rows in session:
            prompts = [prompt_of(row) for row in rows]
            sampler = trainer.save_weights_and_get_sampling_client()
            answers = sampler.sample_batch(prompts, max_tokens=config.max_tokens, temperature=config.temperature)
            rewards = score_batch(reward, prompts, answers, columns=columns_of(rows))
            rollout = trainer.forward(answers, rewards, loss_fn="ppo", **config.options())
            for chosen in parts(len(answers), config, session.step):
                part = [answers[i] for i in chosen]
                loss = trainer.forward_backward(part, loss_fn="ppo", **config.options())
                step = trainer.optim_step(session.adam, value_learning_rate=config.value_learning_rate)
            session.log(
                loss,
                step,
                **{name: rollout.metrics[name] for name in ("reward_mean", "reward_std", "truncated_fraction")},
            )
    return session


def parts(count: int, config: Config, step: int) -> Iterator[list[int]]:
    """Indices of the answers of each optimiser step, in a new seeded order each pass."""
    size = -(-count // config.minibatches)
    for epoch in range(config.ppo_epochs):
        order = list(range(count))
        random.Random(f"ppo {config.seed} {step} {epoch}").shuffle(order)
        yield from (order[start : start + size] for start in range(0, count, size))


if __name__ == "__main__":
    from .command import start

    sys.exit(start("ppo"))
