"""A recipe's rows: read, checked, split, and what a policy is asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import formats
from ..data.examples import Conversation, Preference, PromptCompletion, Text
from ..data.preflight import preflight
from ..data.prepare import check_rows
from ..data.read import load_rows
from ..data.rows import Row, Rows
from ..errors import DatasetError, UsageError
from .arithmetic import arithmetic
from .config import Common, nearest

TASK_ROWS = 512
# Data made on the spot: name -> rows(count, seed).
TASKS: dict[str, Callable[[int, int], Rows]] = {"arithmetic": arithmetic}
_POLICY_COLUMNS = {"prompt", "messages", "conversations", "question", "tools", "system"}
_CONTINUED = 48  # characters of a plain text that the model is asked to continue


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows to evaluate on; `digests` name what was read, by content."""

    rows: Rows
    held_out: Rows
    digests: dict[str, str]

    @property
    def shown(self) -> Rows:
        """Where the prompts answered at the end come from."""
        return self.held_out if len(self.held_out) else self.rows


def load_data(config: Common, *, say: Callable[[str], None]) -> Data:
    """Read the dataset and hold part of it out as the config asks."""
    if config.eval_fraction and config.eval_dataset:
        raise UsageError("eval_fraction and eval_dataset were both given; give one of them")
    rows = _read(config.dataset, config, limit=config.limit, say=say)
    digests, held_out = {config.dataset: rows.digest}, Rows([])
    if config.eval_dataset:
        held_out = _read(config.eval_dataset, config, limit=None, say=say)
        digests[config.eval_dataset] = held_out.digest
    elif config.eval_fraction:
        count = round(config.eval_fraction * len(rows))
        if not 1 <= count < len(rows):
            raise UsageError(
                f"eval_fraction={config.eval_fraction:g} of {len(rows)} rows holds out {count}; both parts need a row: "
                "change it, or give eval_dataset"
            )
        chosen = set(random.Random(f"held out {config.seed}").sample(range(len(rows)), count))
        rows, held_out = _pick(rows, [i for i in range(len(rows)) if i not in chosen]), _pick(rows, sorted(chosen))
    return Data(rows, held_out, digests)


def _read(source: str, config: Common, *, limit: int | None, say: Callable[[str], None]) -> Rows:
    if source in TASKS and not Path(source).exists():
        rows = TASKS[source](limit if limit and limit > 0 else TASK_ROWS, config.seed)
    else:
        try:
            rows = load_rows(source, limit=limit, max_bad=config.max_bad, say=say)
        except DatasetError as error:
            task = nearest(source, TASKS)
            if not task or Path(source).exists():
                raise
            raise DatasetError(f"{error.reason}{task}", path=error.path) from None
    return renamed(rows, config.columns) if config.columns else rows


def renamed(rows: Rows, columns: str) -> Rows:
    """The rows with columns under our names: `prompt=question,completion=reply`, ours first; the others stay.

    Raises:
        UsageError: not such pairs, or a name twice. DatasetError: no row has the column, or ours is there already.
    """
    pairs = [tuple(word.strip() for word in pair.partition("=")[::2]) for pair in columns.split(",")]
    theirs = {old: new for new, old in pairs}
    if not all(new and old for new, old in pairs) or min(len(theirs), len({new for new, _ in pairs})) < len(pairs):
        raise UsageError(
            f"columns={columns!r}: write pairs of our name and yours, such as prompt=question,answer=reply"
        )
    there = {name: None for row in rows for name in row}
    for new, old in pairs:
        if old not in there:
            raise DatasetError(
                f"columns: no row has {old!r}{nearest(old, there)}; there are {', '.join(there)}", path=rows.name
            )
        if new in there and new not in theirs:
            raise DatasetError(
                f"columns: {new!r} is a column already; map it too, or leave {new}= away", path=rows.name
            )
    new_rows = [Row({theirs.get(name, name): value for name, value in row.items()}, source=row.source) for row in rows]
    return Rows(new_rows, name=rows.name, bad=rows.bad)


def _pick(rows: Rows, indices: Sequence[int]) -> Rows:
    return Rows([rows[i] for i in indices], name=rows.name, bad=rows.bad)


def check_data(
    data: Data, config: Common, renderer: Any, *, loss: str, longest: int, say: Callable[[str], None]
) -> tuple[Data, Any]:
    """The rows that can be trained on, and the preflight figures of them.

    Raises:
        DatasetError: a row beyond `max_bad` that cannot be used, with file, line and field; nothing left.
    """
    limits = {
        "loss": loss,
        "renderer": renderer,
        "max_length": config.max_length or longest,
        "overlong": config.overlong,
    }
    prepared = check_rows(data.rows, max_bad=max(config.max_bad - len(data.rows.bad), 0), say=say, **limits)
    report = preflight(prepared, renderer=renderer)
    held_out = data.held_out
    if len(held_out):
        kept = check_rows(held_out, say=say, **limits).kept
        if not kept:
            raise DatasetError("no row left to evaluate on: all are too long; raise max_length")
        held_out = _pick(held_out, sorted(set(kept)))
    return Data(_pick(data.rows, sorted(set(prepared.kept))), held_out, data.digests), report


def check_prompts(data: Data, renderer: Any, *, most: int, say: Callable[[str], None]) -> tuple[Data, list[str]]:
    """The rows whose prompts leave room for an answer, and what to show of them before training."""
    parts, lengths = [], []
    for rows in (data.rows, data.held_out):
        sizes = [len(renderer.generation_prompt(prompt_of(row))) for row in rows]
        kept = [i for i, size in enumerate(sizes) if size <= most]
        if len(kept) < len(sizes):
            say(
                f"{len(sizes) - len(kept):,} of {len(sizes):,} prompts are longer than {most:,} tokens and are left out"
            )
        if len(rows) and not kept:
            raise DatasetError(
                f"no prompt leaves room for an answer: all are longer than {most:,} tokens; lower max_tokens"
            )
        parts.append(_pick(rows, kept))
        lengths += [sizes[i] for i in kept]
    first = parts[0][0]
    lines = [
        f"prompts: {len(parts[0]):,}, {min(lengths)} to {max(lengths)} tokens",
        f"columns for the reward: {', '.join(columns_of([first])) or 'none'}",
        f"example ({first.source or 'first'}):",
        renderer.decode(renderer.generation_prompt(prompt_of(first))),
    ]
    return Data(parts[0], parts[1], data.digests), lines


def prompt_of(row: Any) -> Any:
    """What a policy is asked: a string or messages."""
    return formats.to_example(row, "grpo").prompt


def columns_of(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """The further columns of prompts, for the reward function."""
    names = [name for name in rows[0] if name not in _POLICY_COLUMNS]
    return {name: [row[name] for row in rows] for name in names if all(name in row for row in rows)}


def question_of(row: Any, loss: str) -> tuple[Any, str | None]:
    """A row's prompt and the answer it holds, to show what the model says to it."""
    if loss in formats.POLICY_LOSSES:
        return prompt_of(row), row.get("answer")
    example = formats.to_example(row, loss)
    if isinstance(example, PromptCompletion):
        return example.prompt, example.completion
    if isinstance(example, Text):
        return example.text[:_CONTINUED], example.text[_CONTINUED:]
    if isinstance(example, Preference):
        chosen = example.chosen
        return example.prompt, chosen if isinstance(chosen, str) else chosen[-1]["content"]
    assert isinstance(example, Conversation)
    last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
    return example.messages[:last], example.messages[last]["content"]
