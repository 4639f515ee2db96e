"""Sizes of the attention kernels' blocks, and which rows of a pack of documents each program owns.

Made on the host, once a micro-batch.

Shapes: N packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BEHIND = 1024  # queries behind a prefix that one program walks for each query head
SUMS = 4096  # rows of such sums at most, all pieces of all prefixes together, where there are that many at all


class Blocks(NamedTuple):
    """Rows of the block that one program owns, rows it looks at in one step (a divisor), warps, steps loaded ahead."""

    own: int
    look: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """Block sizes of the three kernels."""

    forward: Blocks
    query: Blocks
    key: Blocks


LONG = 4096  # a token's document, on average over tokens, from where wide blocks pay


def tuning(head_dim: int, capability: tuple[int, int], length: float) -> Tuning:
    """Measured on an H100 (docs of mean 60, mean 500 and one of 8,192 tokens); elsewhere what fits its shared memory.

    Args:
        length: mean over tokens of their document's length.
    """
    if head_dim > 128:
        return Tuning(Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1))
    if capability < (9, 0):
        return Tuning(Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2))
    key = Blocks(64, 32, 4, 3) if head_dim <= 64 else Blocks(64, 64, 4, 2)
    wide = Blocks(128, 64, 8, 3) if length >= LONG and head_dim > 64 else Blocks(64, 32, 4, 3)
    return Tuning(wide, wide, key)


@dataclass(frozen=True)
class Document:
    """Where one document of a pack stands: its queries, its keys (of which the queries are the last), the keys of a
    prefix before these, and how many queries of documents that go on from it follow behind."""

    query: int
    asking: int
    key: int
    length: int
    prefix: int = 0
    before: int = 0
    behind: int = 0


class PackedBlocks:
    """Who owns which rows, made on the host once a micro-batch, the longest work first.

    Attributes:
        length: mean over queries of the keys of their document, the prefix included.
        prefixes: whether some document goes on from another. prefix_tokens: of all that some document goes on from.
        positions: (N,) int32 of each token in its document with its prefix, None without prefixes.
    """

    def __init__(self, documents: Sequence[Document], device: torch.device) -> None:
        self._documents, self._device = documents, device
        asking = sum(d.asking for d in documents)
        self.length = sum(d.asking * (d.length + d.before) for d in documents) / max(1, asking)
        self.prefixes = any(d.before for d in documents)
        self._among = [0, *accumulate(d.length * (d.behind > 0) for d in documents)]
        self.prefix_tokens = self._among.pop()
        self._made: dict[tuple[int, bool | None], Tensor] = {}
        self._positions: Tensor | None = None

    @property
    def positions(self) -> Tensor | None:
        if self.prefixes and self._positions is None:
            parts = [np.arange(d.before, d.before + d.length, dtype=np.int32) for d in self._documents]
            self._positions = self._upload(np.concatenate(parts))
        return self._positions

    def of(self, size: int, *, keys: bool) -> Tensor:
        """(blocks, 6) int32: where the document's first query is or would be, the block's first row in the document, the
        document's length, where its first key is; then of queries' blocks the prefix's first key and length, of keys'
        blocks the document's first row among the prefixes (-1: nothing goes on from it) and 0."""
        if (size, keys) not in self._made:
            if keys:
                rows = np.concatenate(
                    [
                        _rows(d, size, at if d.behind else -1, 0)
                        for d, at in zip(self._documents, self._among, strict=True)
                    ]
                )
                work = rows[:, 2] - rows[:, 1]  # keys are seen by what follows
            else:
                rows = np.concatenate([_rows(d, size, d.prefix, d.before) for d in self._documents])
                work = rows[:, 1] + rows[:, 5]  # queries see what went before
            self._made[size, keys] = self._upload(rows[np.argsort(-work, kind="stable")])
        return self._made[size, keys]

    def prefix_keys(self, size: int) -> Tensor:
        """(blocks, 6) int32 of the prefixes' keys: as `of`, but where the first query behind is, how many there are, and
        the prefix's first row among the prefixes in the end."""
        if (size, None) not in self._made:
            rows = [
                _rows(d, size, d.query + d.asking, d.behind, at)
                for d, at in zip(self._documents, self._among, strict=True)
                if d.behind
            ]
            self._made[size, None] = self._upload(np.concatenate(rows)[:, [0, 1, 2, 4, 5, 6]])
        return self._made[size, None]

    @property
    def splits(self) -> int:
        """Pieces in which the queries behind a prefix are walked; many keys are enough programs without."""
        return max(1, min(-(-max(d.behind for d in self._documents) // BEHIND), SUMS // self.prefix_tokens))

    def _upload(self, values: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host


def _rows(d: Document, size: int, *more: int) -> np.ndarray:
    earlier = d.length - d.asking
    firsts = np.arange(earlier, d.length, size)
    return np.stack(np.broadcast_arrays(d.query - earlier, firsts, d.length, d.key, *more), axis=1)
