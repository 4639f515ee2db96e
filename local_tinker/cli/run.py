"""`local-tinker run`: one of the recipes."""

from __future__ import annotations

from ..recipes import command
from .app import PROGRAM


def run(argv: list[str]) -> int:
    """Train as flags and config file say."""
    actions, _ = command.split(argv)
    if actions.get("help"):
        print(command.usage(f"{PROGRAM} run", actions.get("loss")))
        return 0
    command.execute(command.parse(argv))
    return 0
