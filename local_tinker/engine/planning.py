"""The memory plan applied: a loaded model and the memory found -> what the engine does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..hardware import memory
from ..model.adapter import AdapterSpec
from ..model.dims import ModelDims
from ..model.levels import LEVELS
from ..model.loaded import LoadedModel
from .footprint import standing_parts, total_bytes
from .memory import Choice, TrainSettings, choose, describe, sampler_tokens, smaller_limit, usable_bytes, with_residency

MAX_ROWS = {"cuda": 256, "cpu": 64}  # samples decoded together
PINNED_SHARE = 0.5  # of free host memory, for parked moments and activations
# Free memory is counted in whole grains: a rollout plans each time, and the same plan again is found and not made.
GRAIN = {"cuda": 2**24, "cpu": 1}
HOST_GRAIN = 2**30
PLAIN_LEVELS = ("norms", "layer")  # autograd keeps everything, or the layer is run again


@dataclass(frozen=True)
class Budget:
    """The plan for one adapter on one model, and what it was made from, so that it can be made anew.

    Attributes:
        limit: bytes a step may use, the model's weights included.
        choice: what to do with micro-batches of up to `micro_batch_tokens`.
        sampler_rows, sampler_tokens: samples decoded together, and tokens their cache may hold.
    """

    dims: ModelDims
    settings: TrainSettings
    limit: int
    choice: Choice
    sampler_rows: int
    sampler_tokens: int

    @property
    def micro_batch_tokens(self) -> int:
        return self.choice.tokens

    @property
    def head_rows(self) -> int:
        return self.choice.head_rows

    @property
    def total(self) -> int:
        """Predicted peak of a step, the model's weights included."""
        return total_bytes(self.dims, self.settings, self.choice)

    @property
    def hold_weights(self) -> bool:
        return self.choice.resident_layers == self.dims.layers

    def choice_for(self, tokens: int) -> Choice:
        """The choice for a micro-batch of `tokens`. A document longer than the others' budget is never cut; it gets a
        choice of its own within the same memory."""
        if tokens <= self.choice.tokens:
            return self.choice
        return _choose(self.dims, _of_length(self.settings, tokens), self.limit)

    def smaller(self, longest: int) -> Budget | None:
        """What to try after a call whose longest unit has `longest` tokens ran out of memory; None: nothing is left."""
        tried = [(self.settings, self.choice)]
        if longest > self.choice.tokens:
            tried.insert(0, (_of_length(self.settings, longest), self.choice_for(longest)))
        # The larger one is what did not fit; a smaller plan for all else would not help it.
        limit = smaller_limit(self.dims, *max(tried, key=lambda each: total_bytes(self.dims, *each)))
        if limit is None:
            return None
        settings = replace(self.settings, fewer=True)
        choice = _choose(self.dims, settings, limit)
        # What would have to be allocated first is not part of a way out.
        choice = replace(
            choice,
            resident_layers=min(choice.resident_layers, self.choice.resident_layers),
            parked_moments=choice.parked_moments or self.choice.parked_moments,
        )
        return replace(self, settings=settings, limit=limit, choice=choice)

    def as_before(self, saved: Choice) -> Budget:
        """The plan of another run, whose cut into micro-batches, head chunks and tiles of the MLP decided the rounding.

        What the layers keep decides it only where a micro-batch is larger than a tile: those levels are taken over if they
        fit. All else is planned anew within the same memory.
        """
        settings = replace(self.settings, tokens=saved.tokens)
        fresh = _choose(self.dims, settings, self.limit)
        choice = replace(fresh, head_rows=saved.head_rows, tile=saved.tile)
        exact = replace(saved, resident_layers=0, parked_moments=fresh.parked_moments)
        fits = total_bytes(self.dims, settings, exact) <= self.limit and set(saved.levels) <= set(settings.levels)
        if saved.tokens > saved.tile and fits:
            choice = with_residency(self.dims, settings, exact, self.limit)
        return replace(self, settings=settings, choice=choice)

    def spare_bytes(self, *training: Budget) -> int:
        """Memory that neither the model nor any of these trainings wants."""
        parts = standing_parts(self.dims, self.settings, self.choice)
        idle = sum(parts[name] for name in ("base weights", "embeddings and head", "resident weights"))
        return max(0, self.limit - max((budget.total for budget in training), default=idle))

    def within(self, limit: int) -> Budget:
        """The same for another amount of memory, the model's weights included."""
        return replace(self, limit=limit, choice=_choose(self.dims, self.settings, limit))

    def describe(self) -> str:
        return describe(self.choice, self.settings)


def plan_budget(
    model: LoadedModel,
    spec: AdapterSpec | None,
    *,
    micro_batch_tokens: int | None,
    free_bytes: int | None = None,
    kept_bytes: int = 0,
    fp8: bool = False,
) -> Budget:
    """Plan for a model that is already on the device, next to whatever else is there.

    Args:
        spec: the adapter to train; None plans for sampling alone.
        micro_batch_tokens: the user's choice; None leaves it to the plan.
        free_bytes: what may be used beside the model's own weights; None: what the device has free now.
        kept_bytes: of a sampler's cache that is there already and counts as free.
        fp8: the base multiplies in 8-bit floats.
    """
    dims, kind = model.dims, model.device.type
    settings = TrainSettings(
        kind=kind,
        rank=0 if spec is None else spec.rank,
        quantize=model.quantize or "none",
        tokens=micro_batch_tokens,
        compute_bytes=model.dtype.itemsize,
        levels=PLAIN_LEVELS if model.fast is None else LEVELS,
        adapter_params=0 if spec is None else spec.numel,
        plain=model.fast is None,
        fp8=fp8,
        alone=model.fast is None and not model.plain.packed,
        dropout=spec is not None and spec.dropout > 0,
        started=True,
        host_bytes=int(PINNED_SHARE * memory()[1]) // HOST_GRAIN * HOST_GRAIN if kind == "cuda" else None,
    )
    if free_bytes is None:
        free_bytes = _free_bytes(model.device) + kept_bytes + model.held_bytes
        free_bytes = free_bytes // GRAIN[kind] * GRAIN[kind]
    # the embeddings as the plan counts them, which are a second table where the head is not tied to them
    tables = standing_parts(dims, settings, Choice(tokens=0, levels=()))["embeddings and head"]
    loaded = sum(linear.nbytes() for linear in model.projections.values()) + tables
    limit = loaded + usable_bytes(settings, free_bytes)
    most = MAX_ROWS[kind] * model.max_positions
    return Budget(
        dims=dims,
        settings=settings,
        limit=limit,
        choice=_choose(dims, settings, limit),
        sampler_rows=MAX_ROWS[kind],
        sampler_tokens=sampler_tokens(dims, settings, loaded + free_bytes, most=most),
    )


@lru_cache(maxsize=256)
def _choose(dims: ModelDims, settings: TrainSettings, limit: int) -> Choice:
    return choose(dims, settings, limit)[0]


def _of_length(settings: TrainSettings, tokens: int) -> TrainSettings:
    return replace(settings, tokens=tokens, seq_len=tokens, fewer=False)


def _free_bytes(device: torch.device) -> int:
    """Bytes a new tensor could take: free on the card, within the share of it that torch's allocator is held to, plus what
    that allocator holds unused."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        index = torch.cuda.current_device() if device.index is None else device.index  # what follows wants a number
        allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total)
        return max(0, min(free, allowed - reserved)) + reserved - torch.cuda.memory_allocated(device)
    return memory()[1]
