"""Predicted time of a trained token, so that choices can be compared. No torch, no state.

Everything is counted in floating-point operations of the card's bf16 matrix rate. What takes time otherwise is converted
with ratios that hold within a factor of about two from an RTX 3090 to an H200; a choice between two ways to save memory
needs no better.
"""

from __future__ import annotations

from collections import Counter

from ..model.dims import ModelDims
from ..model.levels import TILED
from .footprint import Choice, TrainSettings, in_tiles, moment_bytes

# operations in the time a byte takes from device memory: 790e12 / 4.8e12 (H200), 165e12 / 1.0e12 (4090)
MEMORY_BYTE = {"cuda": 165, "cpu": 50}
HOST_BYTE = 8000  # the same over PCIe: 165e12 / 25e9 is 6,600, 790e12 / 55e9 is 14,400
SHOWN = 0.25  # share of an offloaded layer's transfers that the computation does not hide
LAUNCHES = {"cuda": 3e11, "cpu": 1e9}  # a layer and micro-batch: launches, and products too small for the full rate
FP8_LAUNCHES = 1e12  # instead of these where products are of 8-bit floats: more launches, beside faster products
TILE_LAUNCHES = 0.25  # of these, for each further tile of a layer's MLP
STEP_TOKENS = 16384  # tokens between two optimiser steps, over which parked moments cross the bus both ways
FP8 = 0.6  # time of a product of 8-bit floats, with rounding what goes in, in that of the same one in bf16 (H100)
DEQUANTISED_BYTES = 2.516  # NF4 read and bf16 written, a weight
ROUNDED_BYTES = 7  # to 8-bit floats: read twice and written, and transposed before that in the backward pass
HEAD_ROW_OVERHEAD = 25  # a chunk of r rows costs 1 + 25 / r times the head's products

_AGAIN = {
    "norms": (),
    "mlp": ("gate_proj", "up_proj"),
    "attention_mlp": ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"),
    "layer": ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "offload": ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
}


def time_per_token(dims: ModelDims, settings: TrainSettings, choice: Choice, *, context: int = 512) -> float:
    """Time of one trained token in operations.

    Args:
        context: mean length of a document, which attention grows with.
    """
    levels = Counter(choice.levels)
    products = _needed(dims, settings, context, head_rows=choice.head_rows)
    products += sum(count * _recomputed(dims, settings, level, context) for level, count in levels.items())
    moved = 0.0
    if not settings.in_place:
        # layers at the front are both the resident and the recomputed ones
        weights = sum(_dequantised(dims, level) for level in choice.levels[choice.resident_layers :])
        made = DEQUANTISED_BYTES + (ROUNDED_BYTES if settings.fp8 else 0)
        moved = MEMORY_BYTE[settings.kind] * made * weights / choice.tokens
    offloaded = 2 * settings.compute_bytes * dims.hidden * levels["offload"] * SHOWN
    parked = 2 * moment_bytes(dims, settings) / STEP_TOKENS if choice.parked_moments else 0.0
    launches = dims.layers
    if in_tiles(settings, choice):
        launches += TILE_LAUNCHES * sum(levels[level] for level in TILED) * (-(-choice.tokens // choice.tile) - 1)
    each = FP8_LAUNCHES if settings.fp8 and settings.kind == "cuda" else LAUNCHES[settings.kind]
    return products + moved + HOST_BYTE * (offloaded + parked) + each * launches / choice.tokens


def _base(settings: TrainSettings) -> float:
    """Time of a product with the base, in that of the same one in the compute type."""
    return FP8 if settings.fp8 else 1.0


def _needed(dims: ModelDims, settings: TrainSettings, context: int, *, head_rows: int = 1 << 30) -> float:
    """Forward and backward without weight gradients of the base: 4 per weight, 6 per adapter weight, 4 V H, attention."""
    head = 4 * dims.vocab * dims.hidden * (1 + HEAD_ROW_OVERHEAD / head_rows)
    attention = 3.5 * dims.layers * _attention(dims, context)
    return 4 * _base(settings) * dims.linear_params + 6 * settings.adapter(dims) + head + attention


def _attention(dims: ModelDims, context: int) -> float:
    """Forward operations a token and layer: scores and values over half the document on average."""
    return 2 * dims.query * context


def _recomputed(dims: ModelDims, settings: TrainSettings, level: str, context: int) -> float:
    attention = _attention(dims, context) if level in ("layer", "offload") else 0.0
    return 2 * _base(settings) * _weights(dims, level) + attention


def _weights(dims: ModelDims, level: str) -> int:
    return sum(dims.projections[name][0] * dims.projections[name][1] for name in _AGAIN[level])


def _dequantised(dims: ModelDims, level: str) -> float:
    """Weights of a layer that a micro-batch dequantises: all in forward, all in backward, and what is computed again."""
    return 2 * dims.linear_params / dims.layers + _weights(dims, level)
