"""Group relative policy optimisation (arXiv 2402.03300): the model answers each prompt several times, and answers that
score above their group's mean become likelier.

`python -m local_tinker.recipes.grpo --model smollm2-135m --dataset arithmetic`, or `local-tinker run --loss grpo`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..hardware import detect
from . import loop, probe, report
from .config import Common, option

if TYPE_CHECKING:
    from ..runs import Run
    from .data import Data


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of a GRPO run; rows hold a prompt and what the reward function needs."""

    reward: str = option(
        "number_match", "A verifier's name, or file.py:function.", aliases=("reward_funcs", "reward_fn")
    )
    batch_size: int = option(4, "Prompts a step.", aliases=("train_batch_size", "global_batch_size"), least=1)
    group_size: int = option(8, "Answers a prompt.", aliases=("num_generations", "n"), least=2)
    max_tokens: int = option(
        512, "Longest answer in tokens.", aliases=("max_completion_length", "max_new_tokens"), least=1
    )
    temperature: float = option(1.0, "Of the sampling.", above=0)
    clip_low: float = option(0.2, "The ratio is clipped below 1 - clip_low.", aliases=("epsilon",), least=0)
    clip_high: float = option(0.2, "The ratio is clipped above 1 + clip_high.", aliases=("epsilon_high",), least=0)
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "What advantages are divided by the deviation of."
    )
    beta: float = option(0.0, "Weight of the KL to the base model.", aliases=("kl_coef",), least=0)

    def options(self) -> dict[str, Any]:
        """Options of the loss."""
        return {name: getattr(self, name) for name in ("clip_low", "clip_high", "scale_rewards", "beta")}


def main(config: Config, *, dry_run: bool = False, resume: Run | None = None) -> Path | None:
    """Train and report; returns the run's folder, or None after a dry run."""
    from .data import check_prompts

    trainer, data = loop.prepare(config, "grpo")
    most = (config.max_length or loop.model_length(config.model)) - config.max_tokens
    data, lines = check_prompts(data, trainer.renderer, most=most, say=report.say)
    print("\n".join(lines), flush=True)
    if dry_run:
        return None
    probe.try_answers(
        trainer, detect(), data, answers=config.batch_size * config.group_size, max_tokens=config.max_tokens
    )
    return loop.finish(train(config, trainer, data, resume=resume), max_tokens=config.max_tokens)


def train(config: Config, trainer: Any, data: Data, *, resume: Run | None = None) -> loop.Session:
    """The loop: sample groups, score them, one clipped policy-gradient step."""
    from ..rewards import score_batch
    from .data import columns_of, prompt_of
    from .scoring import find_reward, mean_reward

    reward = find_reward(config.reward)

    def evaluate() -> dict[str, float]:
        return {"eval_reward": mean_reward(trainer, reward, data.held_out, max_tokens=config.max_tokens)}

    order = loop.order_of(config, data)
    shown = ("reward_mean",)
    with loop.Session(
        config, trainer, order, data, loss="grpo", resume=resume, evaluate=evaluate, headline=shown
    ) as session:
        for rows in session:
            prompts = [prompt_of(row) for row in rows]
            sampler = trainer.save_weights_and_get_sampling_client()
            groups = sampler.sample_batch(
                prompts, n=config.group_size, max_tokens=config.max_tokens, temperature=config.temperature
            )
            rewards = score_batch(reward, prompts, groups, columns=columns_of(rows))
            loss = trainer.forward_backward(groups, rewards, loss_fn="grpo", **config.options())
            step = trainer.optim_step(session.adam)
            session.log(loss, step)
    return session


if __name__ == "__main__":
    from .command import start

    sys.exit(start("grpo"))
