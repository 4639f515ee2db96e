"""Where decoding rows find their keys: lists of pages, shared prompts and the splits in which they are read.

Shapes: B rows, S prefixes, W readers of a prefix, P pages, Hkv key heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PIECE = 16  # tokens copied together where torch's attention reads the pages


@dataclass(frozen=True, eq=False)
class StepPlaces:
    """One step's places in a cache (pages, Hkv, PAGE, D).

    Attributes:
        write: (B * Hkv,) rows of the cache as (pages * Hkv * PAGE, D) where this step's keys go.
        own: (B * Hkv * C,) the rows' own tokens head by head in pieces of PIECE, C of them up to the longest row's end;
            rows of the cache as (pages * Hkv * PAGE / PIECE, PIECE * D). seen: (B, 1, 1, C * PIECE) which tokens exist.
    """

    write: Tensor
    own: Tensor
    seen: Tensor

    @classmethod
    def of(cls, rows: PagedRows, keys: Tensor) -> StepPlaces:
        """Waits for the device to know the longest row."""
        _, shared, page, _ = keys.shape
        heads, device = torch.arange(shared, device=keys.device), keys.device
        pieces = -(-max(1, int(rows.own_length.max())) // PIECE)
        blocks = (rows.own_pages[:, None].long() * shared + heads[:, None])[..., None] * (page // PIECE)
        own = (blocks + torch.arange(page // PIECE, device=device)).flatten(2)[:, :, :pieces]  # (B, Hkv, C)
        return cls(
            write=write_places(rows, keys),
            own=own.flatten(),
            seen=(torch.arange(pieces * PIECE, device=device) < rows.own_length[:, None])[:, None, None],
        )


def write_places(rows: PagedRows, keys: Tensor) -> Tensor:
    """`StepPlaces.write`, without waiting for the device."""
    _, shared, page, _ = keys.shape
    last = (rows.own_length - 1).clamp_min(0).long()
    at = rows.own_pages.gather(1, (last // page)[:, None]).long()  # (B, 1)
    return ((at * shared + torch.arange(shared, device=keys.device)) * page + (last % page)[:, None]).flatten()


@dataclass(frozen=True, eq=False)
class PagedRows:
    """Where B rows find their keys, all on the device. Page 0 is nobody's: what has no place is written there.

    Attributes:
        own_pages: (B, P) int32. own_length: (B,) int32 tokens of the row's own, this step's included.
        prefix_length: (B,) int32, 0 for none; the row's own tokens stand at positions from there on.
        prefix_pages: (S, P') int32, or None where no row has a prefix. readers: (S, W) int32 row numbers, -1 for none.
        own_split, prefix_split: tokens a program reads.
        own_most, prefix_most: the most tokens any row may have; sizes of the grid.
        fixed: add splits up one by one, so that a row's result does not depend on how many splits others need.
        step: see `planned`.
    """

    own_pages: Tensor
    own_length: Tensor
    prefix_length: Tensor
    prefix_pages: Tensor | None
    readers: Tensor | None
    own_split: int
    prefix_split: int
    own_most: int
    prefix_most: int
    fixed: bool = False
    step: StepPlaces | None = None

    def planned(self, keys: Tensor) -> PagedRows:
        """With what every layer's definition would work out again for this step; on a card the kernels need none of it."""
        return self if keys.is_cuda else replace(self, step=StepPlaces.of(self, keys))

    @property
    def own_splits(self) -> int:
        return -(-self.own_most // self.own_split)

    @property
    def prefix_splits(self) -> int:
        return -(-self.prefix_most // self.prefix_split) if self.prefix_pages is not None else 0
