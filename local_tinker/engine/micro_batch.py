"""The documents of a call -> micro-batches under a token budget, each as the tensors that a pass reads.

What stands before the first token that a loss reads is a document's head: a prompt but for its last token. Documents with
the same head (the completions of a group, both answers of a preference pair), or whose heads begin alike (a system
prompt), go into one micro-batch, where what they share is computed once and its keys are read by all of them: the same
sums as from repeated tokens, for fewer.

Shapes: N packed tokens of a micro-batch, M of them with a loss, K targets a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.pack import pack
from ..losses.base import LossSpec
from ..model.attention import VarlenCausal
from ..types import Datum, ModelInput
from .base import Unit

LEAST_HEAD = 32  # tokens of a head that is worth a document of its own


@dataclass(frozen=True)
class Layout:
    """Where a micro-batch's rows belong, on the host: per datum its index in the call, its length and its rows."""

    datums: tuple[int, ...]
    lengths: tuple[int, ...]
    spans: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class MicroBatch:
    """Documents one after the other, with everything the pass needs already on the device.

    Attributes:
        tokens, positions: (N,). attend: keeps each document to itself and its head.
        rows: (M,) positions whose log-probs the loss reads.
        targets: (M,) or (M, K). fields: name -> (M,) or (M, K). segments: (M,) datum of each row.
        pairs: (P, 2) datums of each preference pair, or None.
    """

    tokens: Tensor
    positions: Tensor
    layout: Layout
    attend: VarlenCausal
    rows: Tensor
    targets: Tensor
    fields: dict[str, Tensor]
    segments: Tensor
    pairs: Tensor | None

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.layout.lengths

    @property
    def datums(self) -> tuple[int, ...]:
        return self.layout.datums


def blank(tokens: int) -> Datum:
    """A document of this length with nothing in it, every position trained."""
    zeros = np.zeros(tokens, np.int64)
    return Datum(ModelInput.from_ints(zeros.tolist()), {"target_tokens": zeros})


# -- cutting -----------------------------------------------------------------------------------------------------------


Head = tuple[int, ...]
Heads = Sequence[Sequence[Head | None]]  # of each datum of each unit


def shared_heads(units: Sequence[Unit], spec: LossSpec) -> Heads:
    """Of every datum the tokens that it shares: its whole head where another has the same, else what the heads of others
    that nobody has twice begin with as well; None where that is shorter than LEAST_HEAD."""
    own = [[_head(datum, _rows(datum, spec)) for datum in unit] for unit in units]
    counts = Counter(head for heads in own for head in heads)
    alike: dict[Head, list[Head]] = {}
    for head, count in counts.items():
        if head is not None and count == 1:
            alike.setdefault(head[:LEAST_HEAD], []).append(head)
    shared = {head: _common(cluster) for cluster in alike.values() if len(cluster) > 1 for head in cluster}
    return [[head if counts[head] > 1 else shared.get(head) for head in heads] for heads in own]


def _common(heads: Sequence[Head]) -> Head:
    """What all begin with."""
    first, last = min(heads), max(heads)  # in order: these differ the earliest
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def _head(datum: Datum, rows: np.ndarray) -> Head | None:
    """The tokens before the first row, where they are worth sharing."""
    first = int(rows[0]) if len(rows) else 0
    return tuple(datum.model_input.to_ints()[:first]) if first >= LEAST_HEAD else None


def _rows(datum: Datum, spec: LossSpec) -> np.ndarray:
    """Positions of a datum that the loss reads."""
    weights = datum.loss_fn_inputs.get("weights")
    if spec.rows == "all" or weights is None:
        return np.arange(datum.length)
    return np.flatnonzero(weights if weights.ndim == 1 else (weights != 0).any(axis=1))


def cut(units: Sequence[Unit], *, budget: int, heads: Heads | None = None) -> list[list[int]]:
    """Units -> micro-batches of at most `budget` tokens, longest first; a unit is never cut.

    Args:
        heads: `shared_heads` of the units, which go together by them and count them once; None: nothing is shared.
    """
    if heads is None:
        return pack([[datum.length for datum in unit] for unit in units], budget=budget)
    together: dict[Head | int, list[int]] = {}
    for unit, own in enumerate(heads):
        together.setdefault(own[0] if own[0] is not None and len(set(own)) == 1 else unit, []).append(unit)
    bundles, sizes = [], []
    for head, members in together.items():
        once = len(head) if isinstance(head, tuple) else 0
        lengths = [[datum.length - once for datum in units[unit]] for unit in members]
        for chosen in pack(lengths, budget=max(1, budget - once)):
            bundles.append([members[at] for at in chosen])
            sizes.append([once + sum(sum(lengths[at]) for at in chosen)])
    return [[unit for at in chosen for unit in bundles[at]] for chosen in pack(sizes, budget=budget)]


# -- packing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Document:
    """One document of the pack: tokens and positions, the number of the one it goes on from, and the datum (its place
    among the chosen) whose rows are in it; None for a head."""

    tokens: np.ndarray
    start: int
    prefix: int | None
    datum: int | None


def micro_batch(
    units: Sequence[Unit],
    chosen: Sequence[int],
    spec: LossSpec,
    *,
    device: torch.device,
    heads: Heads | None = None,
) -> MicroBatch:
    """Concatenate the chosen units' datums behind the heads they share; the host knows all lengths and rows, so nothing
    waits for the device."""
    first = np.cumsum([0, *(len(unit) for unit in units)])
    index = [int(first[u]) + i for u in chosen for i in range(len(units[u]))]
    datums = [datum for u in chosen for datum in units[u]]
    spans = [_rows(datum, spec) for datum in datums]
    shared = [None] * len(datums) if heads is None else [head for u in chosen for head in heads[u]]
    documents = _documents(datums, shared)
    edges = np.cumsum([0, *(len(d.tokens) for d in documents)])
    # The rows in the order of the documents: increasing, as a pass wants them.
    placed = [
        (d.datum, spans[d.datum] - d.start + edge)
        for d, edge in zip(documents, edges, strict=False)
        if d.datum is not None
    ]
    order = [datum for datum, _ in placed]

    def put(parts: list[np.ndarray]) -> Tensor:
        host = torch.from_numpy(np.concatenate(parts))
        # from pageable memory the copy would make the host wait for everything queued before it
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)

    packed = {name: put([_column(datums[i], name, spans[i]) for i in order]) for name in _field_names(datums)}
    pair_ids = _pairs([len(units[u]) for u in chosen])
    return MicroBatch(
        tokens=put([d.tokens for d in documents]),
        positions=put([np.arange(d.start, d.start + len(d.tokens), dtype=np.int64) for d in documents]),
        layout=Layout(
            tuple(index[i] for i in order), tuple(datums[i].length for i in order), tuple(spans[i] for i in order)
        ),
        attend=VarlenCausal(edges.tolist(), device, prefixes=[d.prefix for d in documents]),
        rows=put([rows for _, rows in placed]),
        targets=packed.pop("target_tokens"),
        fields=packed,
        segments=put([np.full(len(rows), segment, np.int64) for segment, (_, rows) in enumerate(placed)]),
        pairs=None if pair_ids is None else put([np.argsort(order)[pair_ids]]),
    )


def _documents(datums: Sequence[Datum], heads: Sequence[Head | None]) -> list[_Document]:
    """Datums with the same head one after the other behind it, all others whole, in the order of their first."""
    counts, together = Counter(heads), {}
    for at, head in enumerate(heads):
        together.setdefault(at if head is None or counts[head] == 1 else head, []).append(at)
    documents: list[_Document] = []
    for head, members in together.items():
        start, prefix = 0, None
        if isinstance(head, tuple):
            start, prefix = len(head), len(documents)
            documents.append(_Document(np.array(head, np.int64), 0, None, None))
        for at in members:
            tokens = np.asarray(datums[at].model_input.to_ints(), np.int64)
            documents.append(_Document(tokens[start:], start, prefix, at))
    return documents


def _field_names(datums: Sequence[Datum]) -> list[str]:
    """Every field of the micro-batch; a datum without `weights` counts every position."""
    return ["target_tokens", *sorted({name for datum in datums for name in datum.loss_fn_inputs} - {"target_tokens"})]


def _column(datum: Datum, name: str, span: np.ndarray) -> np.ndarray:
    inputs = datum.loss_fn_inputs
    return inputs[name][span] if name in inputs else np.ones(len(span), np.float32)


def _pairs(sizes: Sequence[int]) -> np.ndarray | None:
    if all(size == 1 for size in sizes):
        return None
    assert all(size == 2 for size in sizes), "a unit is one datum, or a (chosen, rejected) pair"
    first = np.arange(0, 2 * len(sizes), 2, dtype=np.int64)
    return np.stack([first, first + 1], axis=1)
