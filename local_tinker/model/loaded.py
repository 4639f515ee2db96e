"""A frozen base model: its parts, the road it runs on, and the copies of its weights that are held for speed.

Quantised weights may be held dequantised for the road, or in 8-bit floats for the road of that kind, never both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..hardware import fp8_fault
from .dims import ModelDims
from .eight_bit import EightBitGroup
from .head import Head
from .kernels.fp8 import ALIGN
from .linear import FrozenLinear
from .plain import PlainRoad
from .road import FastRoad, collect


@dataclass(eq=False)
class LoadedModel:
    """A frozen base model, ready for adapters.

    Attributes:
        projections: module path -> frozen linear, in the model's order; every one may carry LoRA.
        road: what training and sampling run on: `fast` where it serves this model, else `plain`.
        said: what was decided at load, one line each.
        fingerprint: identifies the weights; adapters and checkpoints are refused on another base.
    """

    config: Any
    tokenizer: Any
    projections: dict[str, FrozenLinear]
    plain: PlainRoad
    fast: FastRoad | None
    head: Head
    head_path: str
    stop_ids: frozenset[int]
    fingerprint: str
    quantize: str | None
    dtype: torch.dtype
    device: torch.device
    said: list[str] = field(default_factory=list)
    _fast_in_fp8: FastRoad | None = field(default=None, init=False)

    @property
    def road(self) -> FastRoad | PlainRoad:
        return self.fast if self.fast is not None else self.plain

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def max_positions(self) -> int:
        return int(
            getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", 0) or 1 << 30
        )

    @property
    def cached_positions(self) -> int:
        """Positions a key-value cache is right for. Rotary kinds that change their frequencies with the length of the
        text (longrope, dynamic) would leave older keys rotated the old way past their original length."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type")
        if kind == "longrope":
            return min(self.max_positions, int(parameters["original_max_position_embeddings"]))
        return self.max_positions

    @property
    def dims(self) -> ModelDims:
        """Dimensions by transformers' common attribute names, which older configs map to their own."""
        config = self.config
        heads, hidden = config.num_attention_heads, config.hidden_size
        return ModelDims(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocab=self.vocab_size,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            max_positions=self.max_positions,
        )

    def road_in(self, *, fp8: bool) -> FastRoad | PlainRoad:
        """The road, or the one on the same tensors whose base products are of 8-bit floats."""
        if not fp8:
            return self.road
        if self._fast_in_fp8 is None:
            self._fast_in_fp8 = FastRoad(self.fast.spec, collect(self.plain.model, self.fast.spec, EightBitGroup))
        return self._fast_in_fp8

    def fp8_fault(self) -> str | None:
        """Why base products cannot be of 8-bit floats, in words for the user; None where they can."""
        if self.fast is None:
            return "this model runs on the plain road"
        if self.device.type == "cuda" and self.dtype != torch.bfloat16:
            return f"its results are bfloat16, and dtype is {str(self.dtype).removeprefix('torch.')!r}"
        odd = [p for p, linear in self.projections.items() if linear.in_features % ALIGN or linear.out_features % ALIGN]
        if odd:
            return f"{odd[0]} is not a multiple of {ALIGN} wide"
        return fp8_fault(torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None)

    @property
    def _groups_in_fp8(self) -> tuple[EightBitGroup, ...]:
        return () if self._fast_in_fp8 is None else self._fast_in_fp8.weights.groups

    @property
    def held_bytes(self) -> int:
        """Copies of quantised weights made for their products."""
        size = self.dtype.itemsize
        dense = sum(size * li.in_features * li.out_features for li in self.projections.values() if li.held)
        return dense + sum(group.held_bytes for group in self._groups_in_fp8)

    def hold_weights(self, layers: int | None = None, *, rank: int = 0, fp8: bool = False) -> None:
        """Keep the dequantised weights of the first `layers` (None: all) on the device, and of no other.

        Args:
            rank: leaves room beside them for adapters of this rank, which the fused projections want.
            fp8: keep them in 8-bit floats instead.
        """
        if self.fast is None:
            for linear in self.projections.values():
                linear.hold()
            return
        if fp8:
            self._release_dense()
        else:
            self.release_fp8()
        for index, layer in enumerate(self.road_in(fp8=fp8).weights.layers):
            for group in layer.groups:
                if layers is None or index < layers:
                    group.hold(rank * len(group.linears))
                else:
                    group.release()

    def release_fp8(self) -> None:
        for group in self._groups_in_fp8:
            group.release()

    def _release_dense(self) -> None:
        if self.quantize is None:
            return  # what is laid out for the products is the base itself
        for group in self.fast.weights.groups:
            group.release()

    def release_weights(self) -> None:
        for linear in self.projections.values():
            linear.release()
        if self.fast is not None:
            self._release_dense()
            self.release_fp8()
