"""Units -> micro-batches under a token budget. Nothing is padded, split or lost."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace

from ..checks import whole


def pack(lengths: Sequence[Sequence[int]], *, budget: int) -> list[list[int]]:
    """As few micro-batches as best-fit decreasing finds, filled evenly where that many can be.

    A last micro-batch of a few hundred tokens costs nearly what a full one does, and the fullest sets the memory.

    Args:
        lengths: for each unit (datums that must stay together, such as a preference pair) the tokens of its datums.
        budget: most tokens of a micro-batch.

    Returns:
        Micro-batches of unit indices, the one with the longest unit first. A unit over the budget is alone.
    """
    whole("the token budget", budget)
    sizes = [sum(unit) for unit in lengths]
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    fitted = _best_fit(order, sizes, budget)
    return _evenly(order, sizes, budget, len(fitted)) or fitted


def _best_fit(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Each unit into the fullest micro-batch that still holds it."""
    out: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, micro-batch), sorted
    for unit in order:
        size = sizes[unit]
        place = bisect_left(room, (size, 0))
        if size > budget or place == len(room):
            left, batch = budget - size, len(out)
            out.append([])
        else:
            left, batch = room.pop(place)
            left -= size
        out[batch].append(unit)
        # A unit over the budget has no room left for even an empty unit.
        if left >= 0:
            insort(room, (left, batch))
    return out


def _evenly(order: Sequence[int], sizes: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Each unit into the emptiest of `count` micro-batches; None where one would not fit."""
    out: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, batch) for batch in range(count)]  # a heap
    for unit in order:
        total, batch = filled[0]
        if total + sizes[unit] > budget:
            return None
        heapreplace(filled, (total + sizes[unit], batch))
        out[batch].append(unit)
    return out
