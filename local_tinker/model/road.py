"""The fast road: a decoder over packed tokens, driven by a `FamilySpec`, on the tensors of a transformers model.

`collect` gathers those without copying; `layer.py` computes. One road serves training and sampling.

Shapes: N packed tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .agree import Seen
from .attention import Attend, VarlenCausal
from .group import GroupLora, ProjectionGroup
from .kernels.decode_begin import embed
from .kernels.rope import Angles, HeadLayout
from .layer import DecoderBody, DecoderPass
from .layer_parts import LayerWeights, Pairs, PassInputs
from .levels import LEVELS, TILE
from .linear import FrozenLinear
from .lora import LoraDropout
from .rope import Rope, rope_of
from .spec import PLACEMENTS, FamilySpec


@dataclass(frozen=True, eq=False)
class RoadWeights:
    """All of a decoder: embedding (V, H), layers, final norm (H,), rotary kinds by name."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    ropes: dict[str, Rope]

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        return tuple(group for layer in self.layers for group in layer.groups)


class FastRoad:
    """Final hidden states of packed tokens, for training and sampling alike."""

    name = "fast"
    packed = True  # documents may share a row, and a cache may be continued

    def __init__(self, spec: FamilySpec, weights: RoadWeights) -> None:
        self.spec, self.weights = spec, weights
        # Gemma multiplies by sqrt(H) rounded to the weights' type (55.5 for 55.4256 in bf16). A scalar taken straight
        # into the product would not be rounded.
        factor = spec.embedding_scale
        self._paths = frozenset(path for layer in weights.layers for path in layer.paths())
        self.embedding_scale = None if factor is None else float(torch.tensor(factor).to(weights.embedding.dtype))

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor,
        attend: Attend,
        pairs: Pairs,
        scale: float,
        levels: Sequence[str] | None = None,
        dropout: LoraDropout | None = None,
        sink: Pairs | None = None,
        rows: Tensor | None = None,
        tile: int = TILE,
        loras: dict[int, GroupLora | None] | None = None,
    ) -> Tensor:
        """tokens, positions (N,) int64 -> hidden states after the final norm (N, H), or (M, H) of the chosen rows.

        Args:
            attend: sees the packed q, k, v of each layer; `VarlenCausal` in training, a cache in sampling.
            pairs: module path -> (A, B) in the compute type; empty for the base alone.
            scale: multiplies B A x.
            levels: what each layer keeps, see `levels.LEVELS`; None: "norms" for all. A pass that keeps nothing gives the
                bits of one that does if it is given the same.
            dropout: on the adapters' inputs.
            sink: module path -> (dA, dB), to which the backward of the result adds; None builds no graph.
            rows: (M,) increasing positions. tile: rows of an MLP of which nothing is kept that are alive at once.
            loras: shared by passes whose pairs hold the same values and which have no dropout, for what they work out of
                those once.
        """
        if not pairs.keys() <= self._paths:
            raise ModelError(f"{min(pairs.keys() - self._paths)} is not a projection of this {self.spec.family} model")
        call = PassInputs(
            attend, pairs, scale, dropout, self._angles(positions), sink, tile, {} if loras is None else loras
        )
        if rows is not None and rows.shape[0] == tokens.shape[0]:
            rows = None
        if sink is None:
            with torch.no_grad():
                return DecoderPass(self.spec, self.weights, call, levels, rows).forward(self.embed(tokens))
        assert isinstance(attend, VarlenCausal), "training attends to packed documents"
        levels = tuple(levels or ("norms",) * self.spec.layers)
        assert len(levels) == self.spec.layers and set(levels) <= set(LEVELS), f"levels {levels}"
        run = DecoderPass(self.spec, self.weights, call, levels, rows)
        return DecoderBody.apply(self.embed(tokens).requires_grad_(True), run)

    @torch.no_grad()
    def watched(self, tokens: Tensor, forced: Seen, *, positions: Tensor, attend: Attend) -> Seen:
        """The base alone, each layer given what it was given there; see `agree`."""
        run = DecoderPass(
            self.spec, self.weights, PassInputs(attend, {}, 1.0, None, self._angles(positions), None), None, None
        )
        made = tuple(run.layer(index, given) for index, given in enumerate(forced.given))
        return Seen((self.embed(tokens), *forced.given[1:]), made, run.final(made[-1]))

    def embed(self, tokens: Tensor) -> Tensor:
        return embed(tokens, self.weights.embedding.detach(), self.embedding_scale)

    def _angles(self, positions: Tensor) -> dict[str, Angles]:
        """cos and sin (N, 1, J) of every rotary kind, in the type that multiplies q and k."""
        dtype = self.weights.embedding.dtype
        dtype = torch.promote_types(dtype, torch.float32) if self.spec.rope_wide else dtype
        angles = {}
        for kind, rope in self.weights.ropes.items():
            cos, sin = rope(positions)
            angles[kind] = cos.to(dtype), sin.to(dtype)
        return angles


def text_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """The text decoder (what holds `layers`) inside a causal language model, with its module path."""
    decoder = model.get_decoder()
    decoder = getattr(decoder, "language_model", decoder)
    return next(path for path, module in model.named_modules() if module is decoder), decoder


def collect(model: nn.Module, spec: FamilySpec, group: type[ProjectionGroup] = ProjectionGroup) -> RoadWeights:
    """Gather the tensors of a transformers model whose projections are `FrozenLinear`. Nothing is copied.

    Args:
        group: what projections of one input become.

    Raises:
        ModelError: a module is missing or not frozen yet.
    """
    prefix, decoder = text_decoder(model)
    prefix = f"{prefix}." if prefix else ""
    kinds = sorted({kind for kind in spec.ropes if kind is not None})
    embedding = decoder.embed_tokens.weight
    return RoadWeights(
        embedding=embedding,
        layers=tuple(_collect_layer(decoder, prefix, index, spec, group) for index in range(spec.layers)),
        final_norm=decoder.norm.weight,
        ropes={kind: rope_of(decoder.rotary_emb, kind, embedding.device) for kind in kinds},
    )


def _collect_layer(
    decoder: nn.Module, prefix: str, index: int, spec: FamilySpec, kind: type[ProjectionGroup]
) -> LayerWeights:
    layer = decoder.layers[index]

    def group(parent: str, *names: str) -> ProjectionGroup:
        linears = []
        for name in names:
            linear = layer.get_submodule(f"{parent}.{name}")
            linear = getattr(linear, "base_layer", linear)  # the plain road may have wrapped it
            if not isinstance(linear, FrozenLinear):
                raise ModelError(
                    f"{prefix}layers.{index}.{parent}.{name} is {type(linear).__name__}, not a frozen projection"
                )
            linears.append(linear)
        return kind(tuple(f"{prefix}layers.{index}.{parent}.{name}" for name in names), tuple(linears))

    norms = [None if name is None else layer.get_submodule(name).weight for name in PLACEMENTS[spec.placement]]
    q_norm, k_norm = (layer.self_attn.q_norm, layer.self_attn.k_norm) if spec.qk_norm else (None, None)
    return LayerWeights(
        group("self_attn", *(("qkv_proj",) if spec.fused else ("q_proj", "k_proj", "v_proj"))),
        group("self_attn", "o_proj"),
        group("mlp", *(("gate_up_proj",) if spec.fused else ("gate_proj", "up_proj"))),
        group("mlp", "down_proj"),
        *norms,
        heads=HeadLayout(
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            norm=spec.norm,
            eps=spec.norm_eps,
            per_head=spec.qk_norm != "whole",
            q_norm=None if q_norm is None else q_norm.weight.detach(),
            k_norm=None if k_norm is None else k_norm.weight.detach(),
        ),
    )
