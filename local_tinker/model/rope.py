"""Rotary positions (arXiv 2104.09864) with transformers' own frequencies, whatever their kind.

cos and sin are computed from the positions once a forward pass and shared by all layers. They are not cached in a table
because its size would have to be known, and the largest position lives on the device.

Shapes: N packed tokens, D head dimension, J rotated pairs (2 J = D unless the rotation is partial).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


@dataclass(frozen=True, eq=False)
class Rope:
    """The frequencies of one rotary kind.

    Attributes:
        inv_freq: (J,) fp32, radians a position.
        scaling: multiplies cos and sin (yarn, longrope).
        long_inv_freq, switch: longrope's second set, for documents longer than `switch` tokens.
        config, layer_type: given back to transformers for the dynamic kind, whose frequencies follow the length.
    """

    kind: str
    inv_freq: Tensor
    scaling: float
    long_inv_freq: Tensor | None = None
    switch: int = 0
    config: Any = None
    layer_type: str | None = None

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (N,) -> cos, sin (N, 1, J) fp32."""
        angles = positions[:, None].float() * self.frequencies(positions)
        return (angles.cos() * self.scaling)[:, None], (angles.sin() * self.scaling)[:, None]

    def frequencies(self, positions: Tensor) -> Tensor:
        """(J,), or (N, J) where the frequencies of a token depend on the length of its document."""
        if self.kind == "longrope":
            long = document_lengths(positions)[:, None] > self.switch
            return torch.where(long, self.long_inv_freq, self.inv_freq)
        if self.kind == "dynamic":
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            lengths = document_lengths(positions)[:, None]
            extra = {"layer_type": self.layer_type} if self.layer_type else {}
            found, _ = ROPE_INIT_FUNCTIONS["dynamic"](self.config, positions.device, seq_len=lengths, **extra)
            return torch.where(lengths > self.config.max_position_embeddings, found, self.inv_freq)
        return self.inv_freq


def document_lengths(positions: Tensor) -> Tensor:
    """positions (N,) of packed documents -> (N,): the largest position of each token's document, plus one.

    A document is a run of consecutive positions. So a packed document is rotated as it would be alone, which the
    largest position of the whole pack would not give.
    """
    starts = torch.ones_like(positions)
    starts[1:] = (positions[1:] != positions[:-1] + 1).to(starts.dtype)
    document = starts.cumsum(0) - 1
    last = torch.zeros_like(positions).scatter_reduce_(0, document, positions, "amax", include_self=False)
    return last[document] + 1


def rope_of(rotary: nn.Module, kind: str, device: torch.device) -> Rope:
    """Read one kind from a transformers rotary module: "default", or a layer type where the module has several."""
    layer_type = kind if isinstance(rotary.rope_type, dict) else None
    prefix = f"{kind}_" if layer_type else ""
    rope_type = rotary.rope_type[kind] if layer_type else rotary.rope_type
    # The `original` buffer is the one that dynamic updates leave alone.
    inv_freq = getattr(rotary, f"{prefix}original_inv_freq")
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"the rotary frequencies are {inv_freq.dtype}: the model was cast as a whole, which loses positions; "
            "load it with dtype= instead of casting it"
        )
    long, switch = None, 0
    if rope_type == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        parameters = rotary.config.rope_parameters[kind] if layer_type else rotary.config.rope_parameters
        switch = parameters["original_max_position_embeddings"]
        extra = {"layer_type": layer_type} if layer_type else {}
        long = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, device, seq_len=switch + 1, **extra)[0]
        long = long.to(device=device, dtype=torch.float32)
    return Rope(
        kind=rope_type,
        inv_freq=inv_freq.to(device=device, dtype=torch.float32),
        scaling=getattr(rotary, f"{prefix}attention_scaling"),
        long_inv_freq=long,
        switch=switch,
        config=rotary.config,
        layer_type=layer_type,
    )
