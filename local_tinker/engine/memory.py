"""The memory plan: what a training step should do so that it fits and is fast. Pure: numbers in, a plan out.

Of all ways to run a step (tokens of a micro-batch, recompute level of each layer, dequantised weights kept, moments and
activations parked in host memory, rows of the head) the one with the least predicted time (`cost`) whose predicted peak
(`footprint`) stays within the memory there is. When the device runs out all the same, `smaller_limit` says what the next
plan may use. The engine, `local-tinker plan` and `local-tinker models` all read this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ..model.dims import ModelDims
from ..model.levels import LEVELS, TILE
from .cost import time_per_token
from .footprint import (
    Choice,
    TrainSettings,
    cache_bytes,
    host_bytes,
    layer_wide_bytes,
    standing_parts,
    total_bytes,
    training_parts,
)

# Share of free memory a plan may fill. The rest is what the allocator loses between blocks; on a CPU also what other
# programs take meanwhile, since the system ends a process there without asking.
USABLE = {"cuda": 0.92, "cpu": 0.80}
PIECES = 2**30 // 5  # lie unused between tensors in a card's allocator, however little is free (0.15 GiB were seen)
TOKENS = (8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512)  # micro-batches that are considered
MOST_TOKENS = {"cuda": 8192, "cpu": 4096}
LAST_RESORT = 2048  # smaller micro-batches are chosen only where no other way fits
COMFORTABLE_TOKENS = 4096  # what `models` answers for
HEAD_ROWS = (2048, 1024, 512, 256)
TILES = {"cuda": (TILE, 2048), "cpu": (TILE,)}
SHRINK = 0.65  # of what a plan needs above the least possible, after it ran out of memory
SAMPLER_SHARE = 0.4  # of the memory left beside the weights, for keys and values
LEAST_SAMPLER_TOKENS = 4096


@dataclass(frozen=True)
class Lever:
    """A way to need less: what to change and the bytes it saves; `slower` by how much (0.1: a tenth), None where it is
    not time that it costs."""

    change: str
    saves: int
    slower: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predicted peak of one training step.

    Args:
        words: the choice as a user reads it.
        parts: name -> bytes; they add up to `total`.
        host_bytes: pinned host memory besides.
        fits: the total is within the memory it was made for.
        levers: up to three ways to need less; those that change no result come first, the cheapest in time first.
    """

    choice: Choice
    words: str
    parts: dict[str, int]
    host_bytes: int
    fits: bool
    levers: tuple[Lever, ...]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_training(dims: ModelDims, settings: TrainSettings, free_bytes: int) -> Plan:
    """The fastest choice within the usable share of `free_bytes`; where nothing fits, the smallest there is."""
    choice, fits = choose(dims, settings, usable_bytes(settings, free_bytes))
    return Plan(
        choice=choice,
        words=describe(choice, settings),
        parts=training_parts(dims, settings, choice),
        host_bytes=host_bytes(dims, settings, choice),
        fits=fits,
        levers=_levers(dims, settings, choice),
    )


def usable_bytes(settings: TrainSettings, free_bytes: int) -> int:
    """What a plan may count on, of memory that is free."""
    share = int(USABLE[settings.kind] * free_bytes)
    return share if settings.kind == "cpu" else max(min(share, free_bytes - PIECES), free_bytes // 2)


def choose(dims: ModelDims, settings: TrainSettings, limit: int) -> tuple[Choice, bool]:
    """The fastest choice whose peak stays within `limit` bytes and True; the smallest and False where there is none."""

    def rank(choice: Choice) -> tuple[bool, float, int]:
        time = time_per_token(dims, settings, choice)
        return choice.tokens < LAST_RESORT, time, total_bytes(dims, settings, choice)

    found = min(_candidates(dims, settings, limit), key=rank, default=None)
    return (found, True) if found is not None else (_least(dims, settings), False)


def smaller_limit(dims: ModelDims, settings: TrainSettings, failed: Choice) -> int | None:
    """Bytes the next choice may use after `failed` ran out of memory, or None when nothing smaller is left.

    What it needed above the least possible shrinks by a third, so that a few tries lead from the fastest plan to the
    smallest.
    """
    needed, least = total_bytes(dims, settings, failed), total_bytes(dims, settings, _least(dims, settings))
    return None if needed <= least else least + int(SHRINK * (needed - least))


def status(dims: ModelDims, free_bytes: int, settings: TrainSettings | None = None) -> str:
    """Ready: a step of 4,096 tokens fits. Tight: one of 512 does. Else OOM."""
    settings = settings or TrainSettings()
    usable = usable_bytes(settings, free_bytes)
    if least_bytes(dims, settings, COMFORTABLE_TOKENS) <= usable:
        return "ready"
    return "tight" if least_bytes(dims, settings, TOKENS[-1]) <= usable else "OOM"


def least_bytes(dims: ModelDims, settings: TrainSettings, tokens: int) -> int:
    """Peak of a step of `tokens` with every memory saver on."""
    return total_bytes(dims, settings, _least(dims, replace(settings, tokens=tokens, fewer=False)))


def sampler_tokens(dims: ModelDims, settings: TrainSettings, free_bytes: int, *, most: int) -> int:
    """Positions the sampler's cache may hold beside the weights, `most` at the outside."""
    parts = standing_parts(dims, settings, Choice(tokens=0, levels=()))
    spare = max(0, free_bytes - parts["base weights"] - parts["embeddings and head"])
    fit = int(SAMPLER_SHARE * spare) // cache_bytes(dims, 1, 1, compute_bytes=settings.compute_bytes)
    return max(LEAST_SAMPLER_TOKENS, min(fit, most))


# -- choosing ----------------------------------------------------------------------------------------------------------


def _candidates(dims: ModelDims, settings: TrainSettings, limit: int) -> Iterator[Choice]:
    """For every micro-batch, head chunk and place of the moments: the shallowest levels that fit, then residency."""
    ladder = _ladder(_levels(settings), dims.layers)
    for parked in (False, True) if settings.kind == "cuda" else (False,):
        for tokens in _token_budgets(settings):
            for rows, tile in product(HEAD_ROWS, _tiles(settings, tokens)):
                start = Choice(tokens=tokens, levels=ladder[0], head_rows=rows, tile=tile, parked_moments=parked)
                choice = _shallowest(dims, settings, limit, start, ladder)
                if choice is not None:
                    yield with_residency(dims, settings, choice, limit)


def _token_budgets(settings: TrainSettings) -> list[int]:
    """Micro-batches that may be chosen, largest first, none below the longest sequence."""
    wanted = settings.tokens or MOST_TOKENS[settings.kind]
    fewer = settings.tokens is None or settings.fewer
    budgets = [wanted, *(tokens for tokens in TOKENS if tokens < wanted and fewer)]
    return sorted({max(tokens, settings.seq_len) for tokens in budgets}, reverse=True)


def _tiles(settings: TrainSettings, tokens: int) -> list[int]:
    """Tiles that may be chosen; one that takes the whole micro-batch is as good as the next."""
    largest, *smaller = TILES[settings.kind]
    return [largest] if settings.plain or settings.dropout else [largest, *(t for t in smaller if t < tokens)]


def _levels(settings: TrainSettings) -> list[str]:
    """Those that may be chosen, shallowest first. Parking needs a device whose memory is not the host's."""
    usable = [level for level in settings.levels if level != "offload" or settings.kind == "cuda"]
    return sorted(usable or ["layer"], key=LEVELS.index)


def _ladder(levels: list[str], layers: int) -> list[tuple[str, ...]]:
    """Levels of all layers, from the shallowest to the deepest, one more layer one level deeper at a time."""
    steps = [(levels[0],) * layers]
    for shallow, deep in zip(levels, levels[1:], strict=False):
        steps += [(deep,) * count + (shallow,) * (layers - count) for count in range(1, layers + 1)]
    return steps


def _shallowest(
    dims: ModelDims, settings: TrainSettings, limit: int, start: Choice, ladder: list[tuple[str, ...]]
) -> Choice | None:
    """The first step of the ladder that fits, by bisection: each needs less than the one before it."""
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        if total_bytes(dims, settings, replace(start, levels=ladder[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    if low == len(ladder):
        return None
    choice = replace(start, levels=ladder[low])
    return choice if _host_has_room(dims, settings, choice) else None


def _host_has_room(dims: ModelDims, settings: TrainSettings, choice: Choice) -> bool:
    return settings.host_bytes is None or host_bytes(dims, settings, choice) <= settings.host_bytes


def with_residency(dims: ModelDims, settings: TrainSettings, choice: Choice, limit: int) -> Choice:
    """Spend what is left on dequantised weights. They buy the least time a byte, so they come last."""
    if settings.in_place:
        return choice
    every = replace(choice, resident_layers=dims.layers)  # needs no room to dequantise in
    if total_bytes(dims, settings, every) <= limit:
        return every
    spare = limit - total_bytes(dims, settings, choice)
    return replace(choice, resident_layers=min(dims.layers - 1, spare // layer_wide_bytes(dims, settings)))


def _least(dims: ModelDims, settings: TrainSettings) -> Choice:
    """Every memory saver on. A model of few layers is smaller without offload, which needs two buffers."""
    tokens = _token_budgets(settings)[-1]
    choices = [
        Choice(tokens=tokens, levels=(level,) * dims.layers, head_rows=HEAD_ROWS[-1], tile=tile, parked_moments=parked)
        for level in _levels(settings)
        for tile in _tiles(settings, tokens)
        for parked in ((False, True) if settings.kind == "cuda" else (False,))
    ]
    allowed = [choice for choice in choices if _host_has_room(dims, settings, choice)]
    return min(allowed or choices, key=lambda choice: total_bytes(dims, settings, choice))


# -- what to say -------------------------------------------------------------------------------------------------------


def describe(choice: Choice, settings: TrainSettings) -> str:
    """The choice in words."""
    words = [f"micro-batches of {choice.tokens:,} tokens"]
    levels = Counter(choice.levels)
    if set(levels) == {"norms"}:
        words.append("activations kept")
    elif len(levels) == 1:
        words.append(f"recompute level {choice.levels[0]!r}")
    else:
        words.append("recompute levels " + ", ".join(f"{level!r} ({count} layers)" for level, count in levels.items()))
    if not settings.in_place:
        form = "in 8-bit floats" if settings.fp8 else "dequantised"
        words.append(f"{choice.resident_layers} of {len(choice.levels)} layers held {form}")
    if choice.parked_moments:
        words.append("moments in host memory")
    return ", ".join(words)


def _levers(dims: ModelDims, settings: TrainSettings, choice: Choice) -> tuple[Lever, ...]:
    """Changes of the choice, which cost time only, the cheapest byte first; then what only the user can give up."""
    before, time = total_bytes(dims, settings, choice), time_per_token(dims, settings, choice)
    held = "no weights held in 8-bit floats" if settings.fp8 else "no dequantised weights kept"
    ways = {held: replace(choice, resident_layers=0)}
    for level in _levels(settings):
        if LEVELS.index(level) > LEVELS.index(choice.levels[-1]):
            ways[f"every layer at recompute level {level!r}"] = replace(choice, levels=(level,) * dims.layers)
            break
    if settings.kind == "cuda":
        ways["moments in host memory"] = replace(choice, parked_moments=True)
    half = max(choice.tokens // 2, settings.seq_len)
    if half >= TOKENS[-1]:
        ways[f"micro-batches of {half:,} tokens"] = replace(choice, tokens=half)
    own = [
        Lever(change, before - total_bytes(dims, settings, other), time_per_token(dims, settings, other) / time - 1)
        for change, other in ways.items()
    ]
    own = sorted((lever for lever in own if lever.saves > 0), key=lambda lever: lever.slower / lever.saves)
    return (*own, *_sacrifices(dims, settings, choice))[:3]


def _sacrifices(dims: ModelDims, settings: TrainSettings, choice: Choice) -> list[Lever]:
    ways = {}
    if settings.quantize != "4bit":
        ways['quantize="4bit"'] = replace(settings, quantize="4bit"), choice
    if settings.seq_len > choice.tokens // 2:  # then it is the sequence that keeps the micro-batch long
        short = settings.seq_len // 2
        ways[f"max_length={short}"] = replace(settings, seq_len=short), replace(choice, tokens=short)
    for rank in (settings.rank // 2, settings.rank // 4):
        if rank >= 1:
            ways[f"rank={rank}"] = replace(settings, rank=rank, adapter_params=None), choice
    before = total_bytes(dims, settings, choice)
    levers = [Lever(change, before - total_bytes(dims, *other)) for change, other in ways.items()]
    return [lever for lever in levers if lever.saves > 0]
