"""The longest batch first: what cannot fit is found in the first minute, not in the third hour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.preflight import Preflight
    from ..hardware import Hardware
    from .config import Common
    from .data import Data


def try_rows(trainer: Any, hardware: Hardware, config: Common, found: Preflight, *, pairs: bool = False) -> None:
    """A batch with the longest row of the data, the others of median length."""
    size = found.lengths
    _try(trainer, hardware, [size.longest, *[size.median] * (config.batch_size - 1)], pairs=pairs)


def try_answers(trainer: Any, hardware: Hardware, data: Data, *, answers: int, max_tokens: int) -> None:
    """A batch of answers as long as they may get, to the longest prompt."""
    from .data import prompt_of

    if hardware.kind == "cuda":
        longest = max(len(trainer.renderer.generation_prompt(prompt_of(row))) for row in data.rows)
        _try(trainer, hardware, [longest + max_tokens] * answers)


def _try(trainer: Any, hardware: Hardware, lengths: list[int], *, pairs: bool = False) -> None:
    # On a CPU nobody says when memory runs out, and the step would take its full time
    if hardware.kind == "cuda":
        trainer.try_longest(lengths, pairs=pairs)
