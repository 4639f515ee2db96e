"""Known-good training loops: one module an objective, a `Config` and a loop each."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import UsageError
from .config import nearest

# loss -> module in this package with `Config` and `main(config, *, dry_run, resume)`
RECIPES = {"sft": "sft", "dpo": "dpo", "grpo": "grpo", "ppo": "ppo"}


def find_recipe(loss: str) -> ModuleType:
    """The recipe's module; an unknown name raises with the nearest."""
    if loss not in RECIPES:
        from ..losses import LOSSES, MISSING_LOSSES

        word = loss.lower().replace("-", "_")
        there = f"there are {', '.join(RECIPES)}"
        if word in MISSING_LOSSES:
            raise UsageError(f"no recipe for loss {loss!r}: {MISSING_LOSSES[word]}; {there}")
        if word in LOSSES and word not in RECIPES and not LOSSES[word].internal:
            raise UsageError(f"no recipe for loss {loss!r}, which `forward_backward` takes from Python; {there}")
        raise UsageError(f"no recipe for loss {loss!r}{nearest(word, RECIPES)}; {there}")
    return importlib.import_module(f".{RECIPES[loss]}", __package__)
