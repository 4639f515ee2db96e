"""The decoding rows on the device: what a step reads, and where each row finds its keys.

Tensors keep their addresses while rows come and go, so that a captured step stays valid.
Shapes: B rows in use, S shared prompts, W readers of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ..model.kernels import power_of_two
from ..model.kernels.draw import Output, RowState
from ..model.kernels.paged import PagedRows
from .group import PAGE, Group, pages_for
from .group import Sequence as Row
from .pick import NO_TOP_K

STOPS = 8  # stop ids a device checks; the host sees the others a block of steps later
MOST_SPLIT = 1024  # tokens of one program: a row that is much longer than the others must not end long after them
FIXED_SPLIT = 256  # tokens of one program where results must not depend on the batch
_TILE_ROWS = 64  # query heads times readers that one tile takes


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def entering_state(rows: Sequence[Row], device: torch.device) -> RowState:
    """The state of rows about to draw from the end of their context."""
    whole = np.zeros((len(rows), 9), np.int64)
    real = np.zeros((len(rows), 3), np.float32)
    stops = np.full((len(rows), STOPS), -1, np.int32)
    for i, row in enumerate(rows):
        drawn, length = len(row.tokens), len(row.prompt_tokens) + len(row.tokens)
        top_k = row.params.top_k or NO_TOP_K
        whole[i] = 0, length - 1, len(row.context), row.offset, drawn, row.max_new - drawn, 1, row.seed, top_k
        real[i] = row.params.temperature, row.params.top_p, row.params.min_p
        known = sorted(row.rules.stop_ids)[:STOPS]
        stops[i, : len(known)] = known
    token, position, own, prefix, number, left, alive, seed, top_k = upload(whole, device).T.contiguous()
    temperature, top_p, min_p = upload(real, device).T.contiguous()
    own, prefix, number, left, alive = (t.to(torch.int32) for t in (own, prefix, number, left, alive))
    return RowState(
        token, position, own, prefix, number, left, alive, seed, temperature, upload(stops, device), top_k, top_p, min_p
    )


def new_output(steps: int, rows: int, device: torch.device, dtype: torch.dtype) -> Output:
    return Output(
        torch.zeros(steps, rows, dtype=torch.int32, device=device),
        torch.zeros(steps, rows, dtype=dtype, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


class DeviceRows:
    """The state of up to `count` rows by slot. Slots without a row stand still, over page 0."""

    def __init__(self, count: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        whole = {name: zeros(count, dtype=torch.int64) for name in ("token", "position", "seed", "top_k")}
        short = {
            name: zeros(count, dtype=torch.int32) for name in ("own_length", "prefix_length", "number", "left", "alive")
        }
        real = {name: zeros(count, dtype=torch.float32) for name in ("temperature", "top_p", "min_p")}
        stops = torch.full((count, STOPS), -1, dtype=torch.int32, device=device)
        self.state = RowState(**whole, **short, **real, stops=stops)
        self.state.own_length.fill_(1)
        self._device = device

    def first(self, count: int) -> RowState:
        """The state of slots 0..count-1."""
        return RowState(**{f.name: getattr(self.state, f.name)[:count] for f in fields(RowState)})

    def put(self, slots: Sequence[int], entering: RowState) -> None:
        at = upload(np.array(slots, np.int64), self._device)
        for f in fields(RowState):
            getattr(self.state, f.name).index_copy_(0, at, getattr(entering, f.name))

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows from slot to slot; targets are free."""
        source, target = upload(np.array(moves, np.int64).T.copy(), self._device)
        for f in fields(RowState):
            tensor = getattr(self.state, f.name)
            tensor.index_copy_(0, target, tensor[source])

    def end(self, slots: Sequence[int]) -> None:
        """These rows draw no more; their slots write to page 0 from the next tables on."""
        at = upload(np.array(slots, np.int64), self._device)
        self.state.alive.index_fill_(0, at, 0)
        self.state.own_length.index_fill_(0, at, 1)
        self.state.prefix_length.index_fill_(0, at, 0)
        self.state.position.index_fill_(0, at, 0)


@dataclass(frozen=True)
class TableShape:
    """Sizes of the page tables and of the attention's grid; a captured step holds for one shape."""

    rows: int
    own_pages: int
    prefixes: int
    prefix_pages: int
    readers: int
    own_split: int
    prefix_split: int
    fixed: bool


def most_readers(group: int) -> int:
    """Rows that one tile of a shared prompt serves, `group` query heads a key head."""
    return max(1, power_of_two(_TILE_ROWS // group + 1) // 2)


def table_shape(
    rows: int,
    prefixes: int,
    *,
    own_tokens: int,
    prefix_tokens: int,
    readers: int,
    kv_heads: int,
    head_bytes: int,
    processors: int,
    fixed: bool,
) -> TableShape:
    """Splits so that a card's processors have some programs each and no more partial results than that takes.

    Args:
        head_bytes: of one head's key. processors: multiprocessors of the card.
    """
    # Programs that keep the memory busy: one a processor where heads are 128 wide, in bf16; narrower ones ask for less
    # each. Those of a shared prompt also leave partial results for every reader, smaller ones where heads are narrow.
    narrow = max(1, 256 // head_bytes)
    busy = processors * narrow
    own_split = _own_split(rows * kv_heads, own_tokens, processors, busy, beside=prefixes > 0)
    prefix_split = _split(prefixes * kv_heads, prefix_tokens, 128, busy * narrow)
    return TableShape(
        rows=rows,
        own_pages=max(1, pages_for(own_tokens)),
        prefixes=prefixes,
        prefix_pages=max(1, pages_for(prefix_tokens)),
        readers=readers,
        own_split=FIXED_SPLIT if fixed else own_split,
        prefix_split=FIXED_SPLIT if fixed else prefix_split,
        fixed=fixed,
    )


def _own_split(segments: int, tokens: int, processors: int, busy: int, *, beside: bool) -> int:
    """Tokens of a program of `segments` lists of keys.

    Beside those of shared prompts, programs need only be as many as keep the memory busy. Alone they also hide each
    other's tails, so there are more of them; but where there are enough with one for each row, nothing is left to be put
    together, which is worth more. Measured on an H100, see `attention_splits` in benchmarks/results/sample_h100.json.
    """
    if not beside and tokens <= MOST_SPLIT and 1.4 * busy <= segments:
        return MOST_SPLIT
    return _split(segments, tokens, 64, busy if beside else 8 * processors)


def _split(segments: int, tokens: int, least: int, most_programs: int) -> int:
    """The smallest split, a power of two from `least` on, with which there are no more programs than that."""
    size = least
    while size < min(MOST_SPLIT, tokens) and segments * -(-tokens // size) > most_programs:
        size *= 2
    return size


def most_entries(rows: int, positions: int) -> int:
    """Numbers in the tables of the most rows, each with a prompt of its own and the longest there may be."""
    return rows * (2 * pages_for(positions) + _TILE_ROWS)


class PageTables:
    """Page numbers of every row and shared prompt in one buffer, written anew when they change.

    Args:
        rows, positions: the most there will be. On a card the buffer is made for them, a few megabytes, since every step
            that was captured is lost when it moves.
    """

    def __init__(self, device: torch.device, *, rows: int, positions: int) -> None:
        self._device = device
        size = most_entries(rows, positions) if device.type == "cuda" else 0
        self._flat = torch.zeros(size, dtype=torch.int32, device=device)

    def fill(self, shape: TableShape, rows: Sequence[Row]) -> bool:
        """Write the tables of the decoding rows; whether the buffer moved, which makes captured steps stale."""
        own = np.zeros((shape.rows, shape.own_pages), np.int32)
        prefix = np.zeros((shape.prefixes, shape.prefix_pages), np.int32)
        readers = np.full((shape.prefixes, shape.readers), -1, np.int32)
        groups: dict[int, list[Row]] = {}
        for row in rows:
            own[row.slot, : len(row.pages)] = row.pages
            if row.group.shared:
                groups.setdefault(id(row.group), []).append(row)
        for at, (group, slots) in enumerate(_segments(groups, shape.readers)):
            pages = group.all_pages
            prefix[at, : len(pages)] = pages
            readers[at, : len(slots)] = slots
        flat = np.concatenate([own.ravel(), prefix.ravel(), readers.ravel()])
        moved = len(flat) > len(self._flat)
        if moved:
            self._flat = torch.zeros(power_of_two(len(flat)), dtype=torch.int32, device=self._device)
        self._flat[: len(flat)].copy_(upload(flat, self._device), non_blocking=True)
        return moved

    def view(self, shape: TableShape, state: RowState) -> PagedRows:
        sizes = [shape.rows * shape.own_pages, shape.prefixes * shape.prefix_pages, shape.prefixes * shape.readers]
        own, prefix, readers = self._flat[: sum(sizes)].split(sizes)
        return PagedRows(
            own_pages=own.view(shape.rows, shape.own_pages),
            own_length=state.own_length,
            prefix_length=state.prefix_length,
            prefix_pages=prefix.view(shape.prefixes, shape.prefix_pages) if shape.prefixes else None,
            readers=readers.view(shape.prefixes, shape.readers) if shape.prefixes else None,
            own_split=shape.own_split,
            prefix_split=shape.prefix_split,
            own_most=shape.own_pages * PAGE,
            prefix_most=shape.prefix_pages * PAGE,
            fixed=shape.fixed,
        )


def count_segments(rows: Sequence[Row], readers: int) -> int:
    """Prefixes that the attention reads for these rows, one for each `readers` rows of a shared prompt."""
    counts: dict[int, int] = {}
    for row in rows:
        if row.group.shared:
            counts[id(row.group)] = counts.get(id(row.group), 0) + 1
    return sum(-(-count // readers) for count in counts.values())


def _segments(groups: dict[int, list[Row]], readers: int) -> list[tuple[Group, list[int]]]:
    return [
        (rows[0].group, [row.slot for row in rows[i : i + readers]])
        for rows in groups.values()
        for i in range(0, len(rows), readers)
    ]
