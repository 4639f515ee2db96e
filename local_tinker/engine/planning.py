"""The memory plan applied: a loaded model and the memory found -> what the engine does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..hardware import memory
from ..model.adapter import AdapterSpec
from ..model.load import LoadedModel
from .memory import ENGINE_LEVELS, Plan, TrainSettings, plan_training, sampler_bytes

SAMPLER_SHARE = 0.4  # of the memory left, for keys and values; training buffers take the rest when they come back
MAX_ROWS = {"cuda": 256, "cpu": 64}


@dataclass(frozen=True)
class Budget:
    """What the plan came to.

    Attributes:
        micro_batch_tokens: most tokens of one micro-batch.
        head_rows: rows of full logits that exist at a time.
        levels: what each layer keeps for its backward pass, see `model.levels`.
        hold_weights: keep dequantised copies of the base.
        sampler_rows, sampler_tokens: samples decoded together, and tokens their cache may hold.
    """

    plan: Plan
    micro_batch_tokens: int
    head_rows: int
    levels: tuple[str, ...]
    hold_weights: bool
    sampler_rows: int
    sampler_tokens: int


def plan_budget(model: LoadedModel, spec: AdapterSpec | None, *, micro_batch_tokens: int | None) -> Budget:
    """Plan for a model that is already on the device, next to whatever else is there.

    Args:
        spec: the adapter to train; None plans for sampling alone.
        micro_batch_tokens: the user's choice; None leaves it to the plan.
    """
    dims = model.dims
    kind = model.device.type
    settings = TrainSettings(
        kind=kind,
        rank=0 if spec is None else spec.rank,
        quantize=model.quantize or "none",
        tokens=micro_batch_tokens,
        compute_bytes=model.dtype.itemsize,
        levels=ENGINE_LEVELS,
        overhead_bytes=0,
    )
    loaded = sum(linear.nbytes() for linear in model.projections.values()) + model.head.weight.nbytes
    held = sum(linear.held for linear in model.projections.values())
    free = _free_bytes(model.device) + loaded + (_dense_bytes(model) if held else 0)
    plan = plan_training(dims, settings, free)
    spare = max(0, free - plan.parts["base weights"] - plan.parts["embeddings and head"])
    per_token = sampler_bytes(dims, 1, 1, compute_bytes=model.dtype.itemsize)
    tokens = max(4096, min(int(SAMPLER_SHARE * spare) // per_token, MAX_ROWS[kind] * model.max_positions))
    return Budget(
        plan=plan,
        micro_batch_tokens=micro_batch_tokens or plan.choice.tokens,
        head_rows=plan.choice.head_rows,
        levels=("norms" if plan.choice.level == "none" else plan.choice.level,) * dims.layers,
        hold_weights=plan.choice.resident_layers == dims.layers,
        sampler_rows=MAX_ROWS[kind],
        sampler_tokens=tokens,
    )


def _dense_bytes(model: LoadedModel) -> int:
    size = model.dtype.itemsize
    return sum(size * linear.in_features * linear.out_features for linear in model.projections.values() if linear.held)


def _free_bytes(device: torch.device) -> int:
    """Bytes a new tensor could take: free on the card, within the share of it that torch's allocator is held to, plus what
    that allocator holds unused."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return max(0, min(free, allowed - reserved)) + reserved - torch.cuda.memory_allocated(device)
    return memory()[1]
