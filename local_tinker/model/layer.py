"""The fast road: one generic decoder layer over packed tokens, driven by a `FamilySpec`.

It runs on the tensors of a transformers model, which `collect` gathers without copying, and computes what that model's
own modules compute, with their rounding points. Nothing here waits for the device.

Shapes: N packed tokens, H hidden, Hq / Hkv query and key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError
from .attention import Attend
from .linear import FrozenLinear
from .lora import LoraDropout, LoraPair, project
from .mlp import gated
from .norm import rms_norm
from .rope import Rope, rope_of, rotate
from .spec import PLACEMENTS, FamilySpec

Pairs = Mapping[str, LoraPair]


@dataclass(frozen=True, eq=False)
class Projections:
    """Linears that read the same input, computed as one group; `paths` name them in the transformers model."""

    paths: tuple[str, ...]
    linears: tuple[FrozenLinear, ...]


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer. A norm that the family does not have is None."""

    qkv: Projections
    out: Projections
    gate_up: Projections
    down: Projections
    before_attention: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None

    def paths(self) -> tuple[str, ...]:
        return self.qkv.paths + self.out.paths + self.gate_up.paths + self.down.paths


@dataclass(frozen=True, eq=False)
class RoadWeights:
    """All of a decoder: embedding (V, H), layers, final norm (H,), rotary kinds by name."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    ropes: dict[str, Rope]


@dataclass(frozen=True, eq=False)
class _Call:
    """What is the same for all layers of one forward pass."""

    attend: Attend
    pairs: Pairs
    scale: float
    dropout: LoraDropout | None
    angles: dict[str, tuple[Tensor, Tensor]]

    def project(self, x: Tensor, group: Projections) -> list[Tensor]:
        loras = [self.pairs.get(path) for path in group.paths]
        return project(x, group.linears, loras, self.scale, dropout=self.dropout)


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
        self._embedding_scale = None if factor is None else float(torch.tensor(factor).to(weights.embedding.dtype))

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor,
        attend: Attend,
        pairs: Pairs,
        scale: float,
        recompute: bool = False,
        dropout: LoraDropout | None = None,
    ) -> Tensor:
        """tokens, positions (N,) int64 -> hidden states after the final norm (N, H).

        Args:
            attend: sees the packed q, k, v of each layer; `VarlenCausal` in training, a cache in sampling.
            pairs: module path -> (A, B) in the compute type; empty for the base alone.
            scale: multiplies B A x.
            recompute: keep each layer's input only and run the layer again in backward.
            dropout: on the adapters' inputs.
        """
        if not pairs.keys() <= self._paths:
            raise ModelError(f"{min(pairs.keys() - self._paths)} is not a projection of this {self.spec.family} model")
        h = F.embedding(tokens, self.weights.embedding)
        if self._embedding_scale is not None:
            h = h * self._embedding_scale
        call = _Call(attend, pairs, scale, dropout, self._angles(positions, h.dtype))
        for index in range(self.spec.layers):
            if recompute and torch.is_grad_enabled():
                h = checkpoint(self._layer, index, h, call, use_reentrant=False, preserve_rng_state=False)
            else:
                h = self._layer(index, h, call)
        return self._norm(h, self.weights.final_norm)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin (N, 1, J) of every rotary kind, in the type that multiplies q and k."""
        dtype = torch.promote_types(dtype, torch.float32) if self.spec.rope_wide else dtype
        angles = {}
        for kind, rope in self.weights.ropes.items():
            cos, sin = rope(positions)
            angles[kind] = cos.to(dtype), sin.to(dtype)
        return angles

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else rms_norm(x, weight, self.spec.norm_eps, self.spec.norm)

    def _layer(self, index: int, h: Tensor, call: _Call) -> Tensor:
        """h (N, H) -> (N, H)."""
        weights = self.weights.layers[index]
        x = self._attention(index, self._norm(h, weights.before_attention), call)
        h = h + self._norm(x, weights.after_attention)
        x = self._mlp(weights, self._norm(h, weights.before_mlp), call)
        return h + self._norm(x, weights.after_mlp)

    def _attention(self, index: int, x: Tensor, call: _Call) -> Tensor:
        spec, weights = self.spec, self.weights.layers[index]
        q_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = call.project(x, weights.qkv)
        q, k, v = parts[0].split([q_size, kv_size, kv_size], dim=-1) if spec.fused else parts
        if spec.qk_norm == "whole":
            q, k = self._norm(q, weights.q_norm), self._norm(k, weights.k_norm)
        q, k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in (q, k, v))  # (N, Hq or Hkv, D)
        if spec.qk_norm == "head":
            q, k = self._norm(q, weights.q_norm), self._norm(k, weights.k_norm)
        kind = spec.ropes[index]
        if kind is not None:
            q, k = rotate(q, *call.angles[kind]), rotate(k, *call.angles[kind])
        window, softcap = spec.windows[index], spec.attention_softcap
        out = call.attend(index, q, k, v, scale=spec.attention_scale, window=window, softcap=softcap)
        return call.project(out.flatten(1), weights.out)[0]

    def _mlp(self, weights: LayerWeights, x: Tensor, call: _Call) -> Tensor:
        parts = call.project(x, weights.gate_up)
        gate, up = parts[0].chunk(2, dim=-1) if self.spec.fused else parts
        return call.project(gated(gate, up, self.spec.activation), weights.down)[0]


def text_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """The text decoder (what holds `layers`) inside a causal language model, with its module path."""
    decoder = model.get_decoder()
    decoder = getattr(decoder, "language_model", decoder)
    return next(path for path, module in model.named_modules() if module is decoder), decoder


def collect(model: nn.Module, spec: FamilySpec) -> RoadWeights:
    """Gather the tensors of a transformers model whose projections are `FrozenLinear`. Nothing is copied.

    Raises:
        ModelError: a module is missing or not frozen yet.
    """
    prefix, decoder = text_decoder(model)
    prefix = f"{prefix}." if prefix else ""
    kinds = sorted({kind for kind in spec.ropes if kind is not None})
    embedding = decoder.embed_tokens.weight
    return RoadWeights(
        embedding=embedding,
        layers=tuple(_collect_layer(decoder, prefix, index, spec) for index in range(spec.layers)),
        final_norm=decoder.norm.weight,
        ropes={kind: rope_of(decoder.rotary_emb, kind, embedding.device) for kind in kinds},
    )


def _collect_layer(decoder: nn.Module, prefix: str, index: int, spec: FamilySpec) -> LayerWeights:
    layer = decoder.layers[index]

    def group(parent: str, *names: str) -> Projections:
        linears = []
        for name in names:
            linear = layer.get_submodule(f"{parent}.{name}")
            linear = getattr(linear, "base_layer", linear)  # the plain road may have wrapped it
            if not isinstance(linear, FrozenLinear):
                raise ModelError(
                    f"{prefix}layers.{index}.{parent}.{name} is {type(linear).__name__}, not a frozen projection"
                )
            linears.append(linear)
        return Projections(tuple(f"{prefix}layers.{index}.{parent}.{name}" for name in names), tuple(linears))

    norms = [None if name is None else layer.get_submodule(name).weight for name in PLACEMENTS[spec.placement]]
    q_norm, k_norm = (layer.self_attn.q_norm, layer.self_attn.k_norm) if spec.qk_norm else (None, None)
    return LayerWeights(
        group("self_attn", *(("qkv_proj",) if spec.fused else ("q_proj", "k_proj", "v_proj"))),
        group("self_attn", "o_proj"),
        group("mlp", *(("gate_up_proj",) if spec.fused else ("gate_proj", "up_proj"))),
        group("mlp", "down_proj"),
        *norms,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
    )
