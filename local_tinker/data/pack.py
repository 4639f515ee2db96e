"""Units -> micro-batches under a token budget. Nothing is padded, split or lost."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from ..errors import UsageError


def pack(lengths: Sequence[Sequence[int]], *, budget: int) -> list[list[int]]:
    """Best-fit decreasing: each unit, longest first, into the fullest micro-batch that still holds it.

    Args:
        lengths: for each unit (datums that must stay together, such as a preference pair) the tokens of its datums.
        budget: most tokens of a micro-batch.

    Returns:
        Micro-batches of unit indices, the one with the longest unit first. A unit over the budget is alone.
    """
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise UsageError(f"the token budget must be a whole number >= 1, got {budget!r}")
    sizes = [sum(unit) for unit in lengths]
    out: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, micro-batch), sorted
    for unit in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
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
