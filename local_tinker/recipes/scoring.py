"""Reward functions: a verifier by name, or a function in a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import rewards
from ..errors import UsageError
from .config import nearest
from .data import columns_of, prompt_of

# Name -> verifier; each reads the row's `answer` column.
REWARDS: dict[str, Callable] = {
    "number_match": rewards.number_match,
    "exact_match": rewards.exact_match,
    "math_match": rewards.math_match,
}


def find_reward(name: str) -> rewards.Reward:
    """A reward function: the name of a verifier, or `file.py:function`.

    Raises:
        UsageError: no such verifier, file or function, with the nearest name.
    """
    if name in REWARDS:
        return rewards.reward(REWARDS[name])
    file, colon, function = name.rpartition(":")
    if not colon:
        raise UsageError(f"no reward {name!r}{nearest(name, REWARDS)}; give {', '.join(REWARDS)}, or file.py:function")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"the reward {name!r} names the file {file!r}, which is not there")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the reward file {file!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:  # what else the file does wrong is for its own traceback to say
        raise UsageError(f"the reward file {file!r} cannot be read: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(
            f"{file} has no function {function!r}{nearest(function, names)} (it has {', '.join(names) or 'none'})"
        )
    return rewards.reward(found)


def mean_reward(trainer: Any, reward: Callable, rows: Sequence[Any], *, max_tokens: int) -> float:
    """Mean reward of the most likely answer to each prompt; answers that cannot be scored do not count."""
    prompts = [prompt_of(row) for row in rows]
    sampler = trainer.save_weights_and_get_sampling_client()
    answers = sampler.sample_batch(prompts, max_tokens=max_tokens, temperature=0)
    scores = [s for s in rewards.score_batch(reward, prompts, answers, columns=columns_of(rows)) if s is not None]
    return sum(scores) / len(scores) if scores else 0.0
