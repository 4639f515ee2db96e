"""Any form of batch -> units: tuples of Datums that stay together (one; for dpo, chosen and rejected)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import DatasetError, UsageError
from ..types import Datum
from . import formats
from .columns import sort_batch
from .datum import preference, rollout, supervised, tensor_encoded
from .examples import Conversation, Example, Preference, PromptCompletion, Text
from .render import Encoded, Renderer
from .rows import located

OVERLONG = ("drop", "truncate_prompt", "error")
Say = Callable[[str], None]
Unit = tuple[Datum, ...]


@dataclass(frozen=True)
class Prepared:
    """Units ready to be packed, and what became of the rest.

    Attributes:
        kept: for each unit the index of the row (or datum, or completion) it came from.
        dropped: rows left out because they are longer than the limit.
        truncated: rows whose prompt lost tokens on the left.
        bad: errors of rows that `max_bad` allowed to skip.
        says: what was said.
        kinds: what the rows were, "conversation" or "text"; empty where only tokens were given.
    """

    units: list[Unit]
    kept: list[int]
    dropped: int = 0
    truncated: int = 0
    bad: tuple[DatasetError, ...] = ()
    says: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset()

    @property
    def metrics(self) -> dict[str, float]:
        """What a call adds to its own: how many rows were left out, where some were."""
        return {"dropped_rows": float(self.dropped)} if self.dropped else {}

    @property
    def datums(self) -> list[Datum]:
        return [datum for unit in self.units for datum in unit]


def to_units(
    batch: Any,
    *,
    loss: str = "sft",
    renderer: Renderer,
    max_length: int | None = None,
    overlong: str = "drop",
    say: Say | None = None,
) -> Prepared:
    """Units of a batch in any of its forms; the same row gives the same tokens by every road.

    Args:
        max_length: most tokens of one sequence, prompt and answer; None for no limit.
        overlong: what happens to a longer one: "drop", "truncate_prompt" (the answer is never cut; dropped where that
            does not suffice) or "error". Datums and completions are never dropped or cut: they raise.

    Raises:
        DatasetError: a row that cannot be trained on. UsageError: what is no batch for this loss.
    """
    fit = _Fit(renderer, max_length, overlong)
    given = sort_batch(batch)
    if given.kind == "datums" and loss == "dpo":
        given = replace(given, kind="pairs", items=_pairs(given.items))
    if given.kind == "rollouts":
        _require_policy_loss(loss)
        prepared = _ready([(rollout(sample),) for sample in given.items], fit)
    elif given.kind in ("datums", "pairs"):
        units = [item if isinstance(item, tuple) else (item,) for item in given.items]
        if loss == "dpo":
            _check_pairs(units)
        prepared = _ready(units, fit)
    elif loss in formats.POLICY_LOSSES:
        raise UsageError(
            f"loss {loss!r} trains on what a policy sampled: give the completions of sample_batch (not their text), or "
            f"Datums with logprobs and advantages; got {given.kind}"
        )
    elif given.kind == "tensors":
        if loss == "dpo":
            raise UsageError("dpo needs pairs: rows with prompt, chosen and rejected, not a tensor dict")
        prepared = _from_tensors(given.items, fit)
    else:
        prepared = _from_rows(given.items, loss, fit, texts=given.kind == "texts")
    says = tuple(renderer.notices.take())
    for message in says if say else ():
        say(message)
    return replace(prepared, says=says)


def check_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    loss: str = "sft",
    renderer: Renderer,
    max_length: int | None = None,
    overlong: str = "drop",
    max_bad: int = 0,
    say: Say | None = None,
) -> Prepared:
    """Every row of a dataset before training starts: `Prepared.kept` are the rows to train on.

    Args:
        max_bad: rows that may be unusable; they are left out, said, and kept in `Prepared.bad`.
    """
    fit = _Fit(renderer, max_length, overlong)
    prepared = _from_rows(sort_batch(rows).items, loss, fit, max_bad=max_bad)
    notices = renderer.notices.take()
    notices += [f"skipped a bad row: {error}" for error in prepared.bad]
    for message in notices if say else ():
        say(message)
    return replace(prepared, says=tuple(notices))


class _Fit:
    """The length limit: encoded sequences that stay together -> themselves, shortened, or None; and the counts."""

    def __init__(self, renderer: Renderer, max_length: int | None, overlong: str) -> None:
        if overlong not in OVERLONG:
            raise UsageError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
        if max_length is not None and (
            not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2
        ):
            raise UsageError(f"max_length must be a whole number >= 2 or None, got {max_length!r}")
        self.renderer, self.max_length, self.overlong = renderer, max_length, overlong
        self.dropped = self.truncated = 0

    def __call__(self, sides: list[Encoded], place: Any) -> list[Encoded] | None:
        """The sequences of a row, cut where that was chosen; None where they are left out. `place` is said of the first."""
        longest = max(len(side.tokens) for side in sides)
        if self.max_length is None or longest <= self.max_length:
            return sides
        over = f"{longest:,} tokens, over max_length={self.max_length:,}"
        if self.overlong == "error":
            raise DatasetError(f'{over}; raise max_length, or choose overlong="drop" or "truncate_prompt"')
        if self.overlong == "truncate_prompt":
            cut = longest - self.max_length
            head = len(self.renderer.prefix_ids) if self._starts_with_prefix(sides[0]) else 0
            # At least one token must stay before the answer, or its first token would have nothing to follow.
            if all(side.prompt_length - cut >= max(head, 1) for side in sides):
                self.truncated += 1
                self.renderer.notices(
                    "prompts over max_length are cut on the left; answers stay whole", key="truncated"
                )
                return [_without(side, head, cut) for side in sides]
        self.dropped += 1
        self.renderer.notices(
            f"rows over max_length are dropped and counted; the first is {place}, with {over}", key="dropped"
        )
        return None

    def check(self, unit: Unit, index: int) -> None:
        """Prepared tokens stand beside rewards or log-probs by their index: they are refused, never dropped."""
        for datum in unit:
            # The last target is not part of the input.
            if self.max_length is not None and datum.length + 1 > self.max_length:
                raise DatasetError(
                    f"{datum.length + 1:,} tokens, over max_length={self.max_length:,}; leave it out or shorten it",
                    path=f"datum {index}" + (f" ({datum.source})" if datum.source else ""),
                )

    def _starts_with_prefix(self, side: Encoded) -> bool:
        prefix = self.renderer.prefix_ids
        return bool(prefix) and side.tokens[: len(prefix)] == prefix


def _without(side: Encoded, start: int, count: int) -> Encoded:
    def cut(values: list) -> list:
        return values[:start] + values[start + count :]

    return Encoded(cut(side.tokens), cut(side.trained))


def encode(example: Example, renderer: Renderer) -> list[tuple[Encoded, ...]]:
    """An example's sequences: one, a pair, or one for every assistant turn."""
    if isinstance(example, Text):
        return [(renderer.text(example.text),)]
    if isinstance(example, PromptCompletion):
        return [(renderer.prompt_completion(example.prompt, example.completion),)]
    if isinstance(example, Conversation):
        return [(turn,) for turn in renderer.turns(example.messages, example.tools, context=example.context)]
    if isinstance(example, Preference):
        return [tuple(_side(example, side, renderer) for side in (example.chosen, example.rejected))]
    raise UsageError(f"a {type(example).__name__} has no answer to train on")


def _side(example: Preference, answer: Any, renderer: Renderer) -> Encoded:
    if isinstance(example.prompt, str):
        return renderer.prompt_completion(example.prompt, answer)
    return renderer.conversation([*example.prompt, *answer], example.tools, context=len(example.prompt))


def _from_rows(items: list, loss: str, fit: _Fit, *, texts: bool = False, max_bad: int = 0) -> Prepared:
    if texts and loss == "dpo":
        raise UsageError("dpo needs pairs: rows with prompt, chosen and rejected, not strings")
    units: list[Unit] = []
    kept: list[int] = []
    bad: list[DatasetError] = []
    shape: str | None = None
    kinds = {"text"} if texts else set()
    for index, item in enumerate(items):
        try:
            if texts:
                row_units, source = [(fit.renderer.text(item),)], None
            else:
                name = formats.recognise(item, loss)
                shape = shape or name
                if name != shape:
                    raise formats.mixed(item, shape, name)
                source = item.source
                example = formats.to_example(item, loss, shape=name)
                kinds.add(_kind(example))
                if isinstance(example, PromptCompletion) and fit.renderer.template_origin == "model":
                    fit.renderer.notices(
                        "prompt and completion are strings, so they are trained as plain text; the model has a chat template: "
                        "give messages (a list of role and content) to train it as a chat"
                    )
                with located(source):
                    row_units = encode(example, fit.renderer)
            with located(source):
                place = f"{'text' if texts else 'row'} {index}" if source is None else source
                fitting = [fit(list(sides), place) for sides in row_units]
                made = [_unit(sides, place) for sides in fitting if sides]
        except DatasetError as error:
            bad.append(error)
            if len(bad) > max_bad:
                raise
            continue
        units += made
        kept += [index] * len(made)
    if shape is not None:
        _announce(items, shape, loss, fit.renderer)
    return Prepared(units, kept, fit.dropped, fit.truncated, tuple(bad), kinds=frozenset(kinds))


def _kind(example: Example) -> str:
    chat = isinstance(example, Conversation) or (
        isinstance(example, Preference) and not isinstance(example.prompt, str)
    )
    return "conversation" if chat else "text"


def _unit(sides: list[Encoded], place: Any) -> Unit:
    return preference(*sides, place) if len(sides) == 2 else (supervised(sides[0], place),)


def _announce(items: Iterable[Mapping[str, Any]], shape: str, loss: str, renderer: Renderer) -> None:
    items = list(items)
    renderer.notices(
        f"read as {shape} ({formats.used_columns(items[0], shape, loss)}): {len(items):,} rows", key=f"shape {shape}"
    )
    unused = formats.unused_columns(items, shape, loss)
    if unused:
        renderer.notices(f"columns not used: {', '.join(unused)}")


def _from_tensors(items: list[Mapping[str, Any]], fit: _Fit) -> Prepared:
    units: list[Unit] = []
    kept: list[int] = []
    rows = [row for item in items for row in tensor_encoded(item)]
    for index, row in enumerate(rows):
        place = f"row {index} of the tensors"
        sides = fit([row], place)
        if sides is not None:
            units.append((supervised(sides[0], place),))
            kept.append(index)
        last_stop = row.tokens[-1] in fit.renderer.stop_ids
        if not last_stop:
            fit.renderer.notices(
                "a row's last trained token is no stop token: the model may never learn to stop (a collator that masks "
                "pad ids also masks EOS where both are one token)",
                key="no stop",
            )
    return Prepared(units, kept, fit.dropped, fit.truncated)


def _ready(units: list[Unit], fit: _Fit) -> Prepared:
    for index, unit in enumerate(units):
        fit.check(unit, index)
    return Prepared(units, list(range(len(units))))


def _pairs(datums: list[Datum]) -> list[Unit]:
    """Datums in the order chosen, rejected, chosen, rejected."""
    if len(datums) % 2:
        raise UsageError(
            f"dpo takes Datums as chosen, rejected, chosen, rejected, ...; got {len(datums)}, an odd number"
        )
    return [(datums[i], datums[i + 1]) for i in range(0, len(datums), 2)]


def _check_pairs(pairs: Iterable[Unit]) -> None:
    for index, (chosen, rejected) in enumerate(pairs):
        place = f"pair {index} of the Datums"
        if _prompt(chosen) != _prompt(rejected):
            raise DatasetError("chosen and rejected continue different prompts", path=place)
        if chosen.model_input == rejected.model_input and _targets(chosen) == _targets(rejected):
            raise DatasetError("chosen and rejected are the same; leave the pair out", path=place)


def _prompt(datum: Datum) -> list[int]:
    weights = datum.loss_fn_inputs.get("weights")
    first = 0 if weights is None or not weights.any() else int(np.flatnonzero(weights)[0])
    return datum.model_input.to_ints()[: first + 1]


def _targets(datum: Datum) -> list[int]:
    return datum.loss_fn_inputs["target_tokens"].tolist() if "target_tokens" in datum.loss_fn_inputs else []


def _require_policy_loss(loss: str) -> None:
    if loss == "dpo":
        raise UsageError("dpo needs pairs: rows with prompt, chosen and rejected; got completions")
