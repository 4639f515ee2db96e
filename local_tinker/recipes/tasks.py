"""Tasks made on the spot, with answers that a verifier checks; and reward functions by name or file."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

from .. import rewards
from ..data.rows import Row, Rows, RowSource
from ..errors import UsageError
from .config import nearest

TASK_ROWS = 512
# Name -> verifier; each reads the row's `answer` column.
REWARDS: dict[str, Callable] = {
    "number_match": rewards.number_match,
    "exact_match": rewards.exact_match,
    "math_match": rewards.math_match,
}


def arithmetic(count: int, seed: int) -> Rows:
    """Sums and differences of small numbers: `{"prompt": [...], "answer": "12"}`."""
    draw, rows = random.Random(f"arithmetic {seed}"), []
    for number in range(1, count + 1):
        a, b = draw.randint(1, 9), draw.randint(1, 9)
        question, answer = (f"{a} + {b}", a + b) if draw.random() < 0.5 else (f"{max(a, b)} - {min(a, b)}", abs(a - b))
        content = f"What is {question}? Answer with the number only."
        row = {"prompt": [{"role": "user", "content": content}], "answer": str(answer)}
        rows.append(Row(row, source=RowSource("arithmetic", number)))
    return Rows(rows, name="arithmetic")


TASKS: dict[str, Callable[[int, int], Rows]] = {"arithmetic": arithmetic}


def find_reward(name: str) -> Callable:
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
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{file} has no function {function!r}{nearest(function, names)} (it has {', '.join(names) or 'none'})")
    return rewards.reward(found)
