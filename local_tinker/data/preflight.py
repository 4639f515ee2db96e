"""What training will see, before it starts: one real example, the lengths, what was left out, whether answers end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..errors import DatasetError
from ..types import Datum
from .prepare import Prepared, Unit
from .render import Renderer

_SHOWN = 1200  # characters of the example


@dataclass(frozen=True)
class Lengths:
    """Tokens a sequence."""

    shortest: int
    median: int
    p95: int
    longest: int


@dataclass(frozen=True)
class Preflight:
    """Figures over all prepared sequences.

    Attributes:
        kept, truncated, dropped, bad: rows.
        sequences: more than `kept` for pairs and for templates that need one sequence a turn.
        example: (text, trained) runs of the first sequence.
        stopped: sequences whose last trained token is a stop token.
    """

    kept: int
    truncated: int
    dropped: int
    bad: int
    sequences: int
    tokens: int
    trained_tokens: int
    lengths: Lengths
    stopped: int
    template_origin: str
    source: str | None
    example: tuple[tuple[str, bool], ...]

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens

    def lines(self) -> list[str]:
        """Plain text: trained tokens stand in [[ ]]."""
        marked = "".join(f"[[{text}]]" if trained else text for text, trained in _shortened(self.example))
        return [*self.figures(), f"example ({self.source or 'first'}), trained tokens in [[ ]]:", *marked.split("\n")]

    def figures(self) -> list[str]:
        size, share = self.lengths, f"{self.trained_tokens:,} of {self.tokens:,} ({self.trained_share:.1%})"
        left = [
            f"{self.kept:,} kept",
            f"{self.truncated:,} with a shortened prompt",
            f"{self.dropped:,} dropped as too long",
        ]
        left += [f"{self.bad:,} bad and skipped"] if self.bad else []
        warning = "" if self.stopped == self.sequences else "  <- the model may not learn to stop"
        return [
            f"rows: {', '.join(left)}",
            f"tokens a sequence: min {size.shortest:,}, median {size.median:,}, p95 {size.p95:,}, max {size.longest:,}",
            f"trained tokens: {share}, {self.sequences:,} sequences",
            f"last trained token is a stop token: {self.stopped:,} of {self.sequences:,}{warning}",
            f"chat template: {self.template_origin}",
        ]


def preflight(prepared: Prepared, *, renderer: Renderer) -> Preflight:
    """The figures of what `to_units` or `check_rows` made.

    Raises:
        DatasetError: when nothing is left to train on.
    """
    datums = prepared.datums
    if not datums:
        raise DatasetError(f"nothing left to train on: {prepared.dropped:,} rows dropped as too long; raise max_length")
    sizes = sorted(datum.length + 1 for datum in datums)
    trained = [_trained(datum) for datum in datums]
    stopped = sum(
        _last_trained(datum, flags) in renderer.stop_ids for datum, flags in zip(datums, trained, strict=True)
    )
    return Preflight(
        kept=len(set(prepared.kept)),
        truncated=prepared.truncated,
        dropped=prepared.dropped,
        bad=len(prepared.bad),
        sequences=len(datums),
        tokens=sum(sizes),
        trained_tokens=sum(map(sum, trained)),
        lengths=_lengths(sizes),
        stopped=stopped,
        template_origin=renderer.template_origin,
        source=datums[0].source,
        example=trained_runs(prepared.units[0], renderer),
    )


def _lengths(sizes: Sequence[int]) -> Lengths:
    # Nearest rank: the smallest length that at least 95 % of the sequences do not exceed.
    rank = -(-95 * len(sizes) // 100) - 1
    return Lengths(sizes[0], int(statistics.median_low(sizes)), sizes[rank], sizes[-1])


def _trained(datum: Datum) -> list[bool]:
    weights = datum.loss_fn_inputs.get("weights")
    return [True] * datum.length if weights is None else [bool(weight) for weight in weights]


def _last_trained(datum: Datum, flags: Sequence[bool]) -> int | None:
    targets = datum.loss_fn_inputs["target_tokens"]
    last = max((index for index, flag in enumerate(flags) if flag), default=None)
    return None if last is None else int(targets[last] if targets.ndim == 1 else targets[last, 0])


def trained_runs(unit: Unit, renderer: Renderer) -> tuple[tuple[str, bool], ...]:
    """The first datum of a unit as text runs with whether they are trained."""
    datum = unit[0]
    ids, targets = datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"]
    tokens = [*ids, int(targets[-1] if targets.ndim == 1 else targets[-1, 0])]
    flags = [False, *_trained(datum)]
    runs = groupby(zip(tokens, flags, strict=True), key=lambda pair: pair[1])
    return tuple((renderer.decode([token for token, _ in run]), flag) for flag, run in runs)


def _shortened(example: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Runs cut in their middle, so that the beginning and the stop token of each stay in sight."""
    most = max(_SHOWN // max(len(example), 1), 40)
    return [
        (text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}", trained)
        for text, trained in example
    ]


def render(report: Preflight) -> Any:
    """The same for a terminal: a rich renderable, trained tokens coloured and still in [[ ]]."""
    from rich.console import Group
    from rich.text import Text

    example = Text()
    for text, trained in _shortened(report.example):
        example.append(f"[[{text}]]" if trained else text, style="bold green" if trained else "dim")
    title = Text(f"example ({report.source or 'first'}), trained tokens in [[ ]]:")
    return Group(*(Text(line) for line in report.figures()), title, example)
