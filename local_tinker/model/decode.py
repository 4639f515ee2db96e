"""The fast road for decoding: one token a row, on the same tensors, with the layer's small steps fused.

The order of operations and their rounding points are those of `model.layer`; a test holds the two together. Nothing here
waits for the device or allocates what outlives the step, so a CUDA graph can hold it.

Shapes: B rows, H hidden, Hkv key heads, D head width, J rotated pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import power_of_two, triton_ready
from .kernels.decode_attention import decode_attention
from .kernels.decode_begin import embed_norm, turn_angles
from .kernels.decode_step import HeadNorms, add_norm, gated_product, rope_write
from .kernels.nf4_rows import rows_fault
from .kernels.norm import rms_norm
from .kernels.paged import PagedRows
from .layer_parts import LayerWeights, Pairs
from .road import FastRoad
from .stacked import Stacked


@dataclass(frozen=True, eq=False)
class _Layer:
    weights: LayerWeights
    qkv: Stacked
    out: Stacked
    gate_up: Stacked
    down: Stacked

    @property
    def groups(self) -> tuple[Stacked, ...]:
        return self.qkv, self.out, self.gate_up, self.down


class DecodeRoad:
    """Hidden states of the next token of every row.

    Attributes:
        version: changes whenever addresses or constants of a captured step do; graphs of another version are stale.
    """

    def __init__(self, road: FastRoad) -> None:
        self.spec, self._road, self._weights = road.spec, road, road.weights
        self._layers = [
            _Layer(w, Stacked(w.qkv), Stacked(w.out), Stacked(w.gate_up), Stacked(w.down)) for w in road.weights.layers
        ]
        self.version = 0
        self._geometry: tuple | None = None

    def unfused(self) -> list[str]:
        """What of a step runs on torch operations on a card, in words for the user."""
        device = self._weights.embedding.device
        if not triton_ready(device.type):
            return ["every step: Triton is not available"]
        spec, found = self.spec, []
        if spec.qk_norm == "whole":
            found.append("norms over whole queries and keys")
        if spec.head_dim != power_of_two(spec.head_dim, 16) or any(
            2 * rope.inv_freq.shape[0] != spec.head_dim for rope in self._weights.ropes.values()
        ):
            found.append(f"rotation of {spec.head_dim}-wide heads")
        four_bit = any(group.group.packed is not None for layer in self._layers for group in layer.groups)
        if four_bit and (reason := rows_fault(device.index)) is not None:
            found.append(f"products of few rows with four-bit weights ({reason})")
        return found

    @torch.no_grad()
    def bind(self, pairs: Pairs, scale: float) -> None:
        """Take an adapter's values over: one copy, tens of megabytes. Shapes as before keep `version`."""
        rank = max((pair[0].shape[0] for pair in pairs.values()), default=0)
        for group in (g for layer in self._layers for g in layer.groups):
            group.prepare(rank)
        copies = []
        for layer in self._layers:
            for group in layer.groups:
                copies += group.bind([pairs.get(path) for path in group.group.paths], scale)
        if copies:
            torch._foreach_copy_([to for to, _ in copies], [source for _, source in copies])
        geometry = (rank, scale, frozenset(pairs), tuple(g.address for layer in self._layers for g in layer.groups))
        if geometry != self._geometry:
            self._geometry, self.version = geometry, self.version + 1

    @property
    def current(self) -> bool:
        """Whether the adapter that was bound still stands where it was put."""
        return all(group.current for layer in self._layers for group in layer.groups)

    def release(self) -> None:
        """Let go of what is laid out for decoding; the projections keep their weights."""
        for layer in self._layers:
            for group in layer.groups:
                group.release()
        self._geometry = None

    def hidden(
        self, tokens: Tensor, positions: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: PagedRows
    ) -> Tensor:
        """tokens and positions (B,) -> hidden states after the final norm (B, H); keys and values are stored on the way.

        Args:
            keys, values: a layer: (pages, Hkv, PAGE, D).
        """
        spec, before = self.spec, [layer.weights.before_attention for layer in self._layers]
        embedding, factor = self._weights.embedding.detach(), self._road.embedding_scale
        h, normed = embed_norm(tokens, embedding, factor, before[0], eps=spec.norm_eps, kind=spec.norm)
        angles, rows = self._angles(positions, h.dtype), rows.planned(keys[0])
        following = [*before[1:], self._weights.final_norm]
        for index, layer in enumerate(self._layers):
            weights = layer.weights
            x = self._attention(index, layer, normed, angles, keys[index], values[index], rows)
            normed = self._add_norm(x, h, weights.after_attention, weights.before_mlp)
            y, low = layer.gate_up.product(normed)
            size = layer.gate_up.outputs // 2
            x = layer.down.adapted(gated_product(y, size, spec.activation, low_rank=low))
            normed = self._add_norm(x, h, weights.after_mlp, following[index])
        return normed

    def _add_norm(self, x: Tensor, h: Tensor, after: Tensor | None, before: Tensor | None) -> Tensor:
        return add_norm(x, h, after, before, eps=self.spec.norm_eps, kind=self.spec.norm)

    def _attention(
        self, index: int, layer: _Layer, x: Tensor, angles: dict, keys: Tensor, values: Tensor, rows: PagedRows
    ) -> Tensor:
        spec, weights = self.spec, layer.weights
        y, low = layer.qkv.product(x)
        norms = None
        if spec.qk_norm == "whole":
            y, low = self._norm_whole(y if low is None else low.add_to(y), weights), None
        elif spec.qk_norm == "head":
            norms = HeadNorms(weights.heads.q_norm, weights.heads.k_norm, spec.norm_eps, spec.norm)
        kind = spec.ropes[index]
        q = rope_write(
            y,
            None if kind is None else angles[kind],
            keys,
            values,
            rows,
            heads=spec.heads,
            low_rank=low,
            norms=norms,
        )
        out = decode_attention(
            q,
            keys,
            values,
            rows,
            scale=spec.attention_scale,
            window=spec.windows[index],
            softcap=spec.attention_softcap,
        )
        return layer.out.adapted(out)

    def _norm_whole(self, y: Tensor, weights: LayerWeights) -> Tensor:
        heads = weights.heads
        q, k, v = y[:, : sum(heads.sizes)].split(heads.sizes, 1)
        q, k = (rms_norm(t, w, heads.eps, heads.norm) for t, w in ((q, heads.q_norm), (k, heads.k_norm)))
        return torch.cat([q, k, v], 1)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """cos and sin (B, J) of every rotary kind. Kinds whose frequencies change with the length never get that far:
        `LoadedModel.cached_positions` ends a text before."""
        dtype = torch.promote_types(dtype, torch.float32) if self.spec.rope_wide else dtype
        return {
            kind: turn_angles(positions, rope.inv_freq, rope.scaling, dtype)
            for kind, rope in self._weights.ropes.items()
        }
