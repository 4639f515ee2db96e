"""What a decoder is made of, what is the same for all layers of one pass, and what a layer keeps between its forward and
its backward.

Shapes: N packed tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from .attention import Attend
from .attention import Kept as KeptAttention
from .group import GroupLora, ProjectionGroup
from .kernels.rope import Angles, HeadLayout
from .levels import TILE
from .lora import LoraDropout, LoraPair
from .offload import Parked

Pairs = Mapping[str, LoraPair]


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer. A norm that the family does not have is None."""

    qkv: ProjectionGroup
    out: ProjectionGroup
    gate_up: ProjectionGroup
    down: ProjectionGroup
    before_attention: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    heads: HeadLayout

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def paths(self) -> tuple[str, ...]:
        return tuple(path for group in self.groups for path in group.paths)


class Decoder(Protocol):
    """What a pass reads of `road.RoadWeights`."""

    layers: tuple[LayerWeights, ...]
    final_norm: Tensor


@dataclass(frozen=True, eq=False)
class PassInputs:
    """What is the same for all layers of one pass.

    Attributes:
        sink: where gradients are added; None: there is no backward. tile: rows of the MLP that are alive at once where
            nothing of it is kept.
    """

    attend: Attend
    pairs: Pairs
    scale: float
    dropout: LoraDropout | None
    angles: dict[str, Angles]
    sink: Pairs | None
    tile: int = TILE
    loras: dict[int, GroupLora | None] = field(default_factory=dict)

    def lora(self, group: ProjectionGroup) -> GroupLora | None:
        if id(group) not in self.loras:
            self.loras[id(group)] = group.lora(self.pairs, self.scale, self.dropout)
        return self.loras[id(group)]


@dataclass(eq=False)
class AttentionParts:
    """What the attention half of a layer makes on its way; a field that was let go of is None."""

    qkv: Tensor | None = None
    thin_qkv: Tensor | None = None
    out: Tensor | None = None
    kept: KeptAttention | None = None
    thin_out: Tensor | None = None
    projected: Tensor | None = None  # before the norm after attention, where there is one


@dataclass(eq=False)
class MlpParts:
    gate_up: Tensor | None = None
    thin_gate_up: Tensor | None = None
    thin_down: Tensor | None = None
    projected: Tensor | None = None


@dataclass(eq=False)
class KeptLayer:
    """One layer between forward and backward."""

    h: Tensor | Parked
    h2: Tensor | None
    attention: AttentionParts
    mlp: MlpParts
