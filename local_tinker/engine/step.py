"""One micro-batch: forward -> loss -> backward -> gradients of sums.

Shapes: N packed tokens of a micro-batch, M of them with a loss, K targets a token, H hidden, S datums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..losses.base import LossData, LossInputs, LossSpec, LossTerms, Metric, combine_metrics
from ..model.group import GroupLora
from ..model.head import CHUNK, target_logprobs
from ..model.loaded import LoadedModel
from ..model.lora import LoraDropout, LoraPair, gradient_leaf
from .footprint import Choice
from .micro_batch import Layout, MicroBatch


@dataclass(frozen=True)
class Weights:
    """An adapter as a pass reads it: pairs in the compute type and their scale; the head's own pair apart.

    Attributes:
        fp8: whether the base below it multiplies in 8-bit floats.
        loras: what passes over these values share.
    """

    pairs: Mapping[str, LoraPair]
    scale: float
    head_path: str
    fp8: bool = False
    loras: dict[int, GroupLora | None] = field(default_factory=dict, compare=False)

    @cached_property
    def body(self) -> dict[str, LoraPair]:
        return {path: pair for path, pair in self.pairs.items() if path != self.head_path}

    @property
    def head(self) -> LoraPair | None:
        return self.pairs.get(self.head_path)


@dataclass(frozen=True)
class Gradients:
    """Where a pass adds its gradients of sums: by module path for the adapter, (H + 1,) for the value head."""

    adapter: Mapping[str, LoraPair]
    value: Tensor | None = None


@dataclass
class Outcome:
    """A call's sums, still on the device; reading them is what waits."""

    total: Tensor | float = 0.0
    weight: Tensor | float = 0.0
    metrics: dict[str, Metric] = field(default_factory=dict)
    logprobs: list[tuple[Layout, Tensor]] = field(default_factory=list)
    values: list[tuple[Layout, Tensor]] = field(default_factory=list)
    reference: list[tuple[Layout, Tensor]] = field(default_factory=list)


def run_forward(
    model: LoadedModel,
    micro: MicroBatch,
    weights: Weights,
    *,
    needs: frozenset[str] = frozenset(),
    reference: Weights | None = None,
    value_head: Tensor | None = None,
    gradients: Gradients | None = None,
    choice: Choice | None = None,
    dropout: LoraDropout | None = None,
) -> LossInputs:
    """The model over one micro-batch: log-probs of the targets and what else the loss `needs`.

    The reference runs over the same micro-batch through the same kernels, so equal weights give equal bits.

    Args:
        gradients: where a backward of the result adds to; None builds no graph.
        choice: the plan for it; the same one gives the same bits with and without a graph. None: everything is kept.
    """
    head_rows = CHUNK if choice is None else choice.head_rows
    reference_logprobs = micro.fields.get("reference_logprobs")
    if "reference" in needs and reference_logprobs is None:
        assert reference is not None
        reference_logprobs = _reference_logprobs(
            model, micro, reference, choice, head_rows
        )  # before there is a graph to hold
    sink = None if gradients is None else gradients.adapter
    hidden = _hidden(model, micro, weights, choice, dropout=dropout, sink=sink)
    pair = weights.head
    if gradients is not None and pair is not None:
        pair = tuple(map(gradient_leaf, pair, sink[weights.head_path]))
    if gradients is not None and gradients.value is not None:
        value_head = gradient_leaf(value_head, gradients.value)
    logprobs, entropy = target_logprobs(
        hidden,
        model.head,
        micro.targets,
        pair=pair,
        lora_scale=weights.scale,
        entropy="entropy" in needs,
        chunk=head_rows,
    )
    values = None
    if "values" in needs:
        assert value_head is not None
        values = hidden.to(value_head.dtype) @ value_head[:-1] + value_head[-1]  # (M,)
    return LossInputs(logprobs, entropy, values, reference_logprobs)


@torch.no_grad()
def _reference_logprobs(
    model: LoadedModel, micro: MicroBatch, reference: Weights, choice: Choice | None, head_rows: int
) -> Tensor:
    hidden = _hidden(model, micro, reference, choice)
    logprobs, _ = target_logprobs(
        hidden, model.head, micro.targets, pair=reference.head, lora_scale=reference.scale, chunk=head_rows
    )
    return logprobs


def _hidden(
    model: LoadedModel,
    micro: MicroBatch,
    weights: Weights,
    choice: Choice | None,
    *,
    dropout: LoraDropout | None = None,
    sink: Mapping[str, LoraPair] | None = None,
) -> Tensor:
    """Final hidden states of the rows the loss reads, (M, H)."""
    return model.road_in(fp8=weights.fp8).hidden(
        micro.tokens,
        positions=micro.positions,
        attend=micro.attend,
        pairs=weights.body,
        scale=weights.scale,
        levels=None if choice is None else choice.levels,
        dropout=dropout,
        sink=sink,
        rows=micro.rows,
        **({} if choice is None else {"tile": choice.tile}),
        loras=weights.loras if dropout is None else None,
    )


def loss_terms(spec: LossSpec, out: LossInputs, micro: MicroBatch, options: Mapping[str, Any]) -> LossTerms:
    data = LossData(fields=micro.fields, segments=micro.segments, n_segments=len(micro.lengths), pairs=micro.pairs)
    return spec.fn(out, data, **options)


def record(outcome: Outcome, micro: MicroBatch, out: LossInputs, terms: LossTerms | None) -> None:
    """Add a micro-batch to the call's sums, without waiting for the device."""
    outcome.logprobs.append((micro.layout, out.logprobs.detach()))
    if out.values is not None:
        outcome.values.append((micro.layout, out.values.detach()))
    if out.reference_logprobs is not None:
        outcome.reference.append((micro.layout, out.reference_logprobs))
    if terms is not None:
        outcome.total = outcome.total + terms.total.detach()
        outcome.weight = outcome.weight + terms.weight
        outcome.metrics = combine_metrics([outcome.metrics, terms.metrics])


def per_datum(parts: Sequence[tuple[Layout, Tensor]], count: int) -> list[np.ndarray]:
    """Rows back to their datums, in the order given; positions the loss did not read are 0."""
    found: list[np.ndarray | None] = [None] * count
    for layout, packed in parts:
        host, at = packed.cpu().numpy(), 0
        for index, length, span in zip(layout.datums, layout.lengths, layout.spans, strict=True):
            full = np.zeros((length, *host.shape[1:]), host.dtype)
            full[span] = host[at : at + len(span)]
            found[index] = full
            at += len(span)
    assert all(f is not None for f in found)
    return found
