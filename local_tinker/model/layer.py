"""One generic decoder layer over packed tokens, and the pass over all of them, forward and backward.

It computes what the transformers model's own modules compute, with their rounding points. Nothing here waits for the
device. A layer has its backward written out, so that what it keeps is a choice (`levels.LEVELS`) and not what autograd
happens to save, and so that the backward's own kernels make norm outputs and act(gate) * up again on their way. Gradients
of the adapter are added straight to the caller's flat buffer.

Shapes: N packed tokens, H hidden, Q = Hq D query width, K = Hkv D key width, F intermediate, m R columns of a group's
adapters, T = m R rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .attention import Kept as KeptAttention
from .group import GroupLora, ProjectionGroup, padded
from .kernels.norm import add_norm, norm_backward
from .kernels.rope import Angles, rotate_back_, rotate_qk
from .kernels.swiglu import gated, gated_backward_
from .layer_parts import AttentionParts, Decoder, KeptLayer, LayerWeights, MlpParts, PassInputs
from .levels import LEVELS, TILED
from .offload import Parked, Parking, parking_beside
from .spec import FamilySpec


class DecoderBody(torch.autograd.Function):
    """The decoder as one node of autograd's graph. The embedded tokens ask for a gradient only so that autograd calls
    backward; they get none."""

    @staticmethod
    def forward(ctx, embedded: Tensor, run: DecoderPass) -> Tensor:
        ctx.run = run
        return run.forward(embedded)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        run, ctx.run = ctx.run, None
        run.backward(grad)
        return None, None


class DecoderPass:
    """One forward over all layers and, where gradients have somewhere to go, its backward.

    Args:
        levels: of each layer; without a backward they say which MLPs are computed in tiles, so that both kinds of pass
            give the same bits. None: where there are more rows than a tile has.
    """

    def __init__(
        self, spec: FamilySpec, decoder: Decoder, call: PassInputs, levels: Sequence[str] | None, rows: Tensor | None
    ) -> None:
        self.spec, self.layers, self.final_norm = spec, decoder.layers, decoder.final_norm
        self.call, self.levels, self.rows = call, levels, rows
        self._kept: list[KeptLayer] = []
        self._final: Tensor | None = None
        self._parking: Parking | None = None
        self._wide: Tensor | None = None

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, h: Tensor) -> Tensor:
        """Embedded tokens (N, H) -> hidden states after the final norm, (N, H) or of the chosen rows (M, H)."""
        pending, self._count = None, h.shape[0]
        flow = [h, pending]  # a layer takes what it is given out of here, so that nothing holds it longer
        del h
        try:
            for index in range(self.spec.layers):
                flow += self._layer(index, flow)
        except BaseException:
            self._join_copies()
            raise
        h, pending = flow
        if self.rows is not None:
            h, pending = h.index_select(0, self.rows), pending.index_select(0, self.rows)
        return self.final(h, pending)

    def layer(self, index: int, h: Tensor) -> Tensor:
        """One layer alone: the residual stream (N, H) before and after it."""
        h, pending = self._layer(index, [h, None])
        return h + pending

    def final(self, h: Tensor, pending: Tensor | None = None) -> Tensor:
        """The final norm of the residual h + pending (N, H)."""
        out = torch.empty_like(h)
        total = add_norm(h, pending, self.final_norm, self.spec.norm_eps, self.spec.norm, out=out)
        if self._keeps:
            self._final = total
        return out

    @property
    def _keeps(self) -> bool:
        return self.call.sink is not None

    def _layer(self, index: int, flow: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Residual and what is still to be added to it -> the same after this layer."""
        weights, lora = self.layers[index], self.call.lora
        level = None if self.levels is None else self.levels[index]
        h, x = self._enter(*flow, weights.before_attention, weights.qkv, lora(weights.qkv))
        flow.clear()
        parked = self._park(h) if self._keeps and level == "offload" else None
        attention, y = self._attention(index, x, keep=self._keeps)
        del x
        y = self._after(y, weights.after_attention)
        if level is None or level in TILED:
            if self._keeps:
                self._keep(h if parked is None else parked, None, AttentionParts(), MlpParts(), level)
            del attention
            made = self._mlp_in_tiles(weights, h, y)
            if parked is not None:
                parked.leave()
            return made
        h2, mlp, z = self._mlp(weights, h, y)
        if self._keeps:
            self._keep(h, h2, attention, mlp, level)
        return h2, self._after(z, weights.after_mlp)

    def _attention(self, index: int, x: Tensor, *, keep: bool) -> tuple[AttentionParts, Tensor]:
        """The group's input (N, H + T) -> everything on the way, and the projected output (N, H)."""
        weights = self.layers[index]
        qkv, thin_qkv = weights.qkv.forward(x, self.call.lora(weights.qkv))
        out, kept = self._attend(index, rotate_qk(qkv, weights.heads, self._rotation(index)), keep=keep)
        y, thin_out = weights.out.forward(out.flatten(1), self.call.lora(weights.out))
        projected = y if weights.after_attention is not None else None
        return AttentionParts(qkv, thin_qkv, out, kept, thin_out, projected), y

    def _attend(self, index: int, rotated: Tensor, *, keep: bool) -> tuple[Tensor, KeptAttention | None]:
        spec = self.spec
        q, k, v = self.layers[index].heads.split(rotated)
        options = dict(scale=spec.attention_scale, window=spec.windows[index], softcap=spec.attention_softcap)
        if keep:
            return self.call.attend.forward(q, k, v, **options)
        return self.call.attend(index, q, k, v, **options), None

    def _rotation(self, index: int) -> Angles | None:
        kind = self.spec.ropes[index]
        return None if kind is None else self.call.angles[kind]

    def _mlp(self, weights: LayerWeights, h: Tensor, pending: Tensor | None) -> tuple[Tensor, MlpParts, Tensor]:
        """-> the residual h2 = h + pending, everything on the way, and the projected output (N, H)."""
        lora = self.call.lora
        h2, x = self._enter(h, pending, weights.before_mlp, weights.gate_up, lora(weights.gate_up))
        gate_up, thin_gate_up = weights.gate_up.forward(x, lora(weights.gate_up), out=self._scratch(x, weights.gate_up))
        del x
        made = gated(gate_up, self.spec.activation, spent=self._wide is not None)
        z, thin_down = weights.down.forward(made, lora(weights.down))
        projected = z if weights.after_mlp is not None else None
        return h2, MlpParts(gate_up, thin_gate_up, thin_down, projected), z

    def _scratch(self, x: Tensor, group: ProjectionGroup) -> Tensor | None:
        """Where gate and up of every layer go when nothing is kept. A CPU's allocator hands a block of this size back to
        the system each time it is freed, and filling it with new pages takes a tenth of the pass."""
        if self.levels is not None or x.is_cuda:
            return None
        if self._wide is None or self._wide.shape != (x.shape[0], group.outputs):
            self._wide = x.new_empty(x.shape[0], group.outputs)
        return self._wide

    def _mlp_in_tiles(self, weights: LayerWeights, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._whole(h):
            h2, _, z = self._mlp(weights, h, y)
            return h2, self._after(z, weights.after_mlp)
        residual, pending = torch.empty_like(h), torch.empty_like(h)
        with self._dense_mlp(weights):
            for rows in self._tiles(h):
                residual[rows], made, z = self._mlp(weights, h[rows], y[rows])
                del made  # gate and up, before the next tile's
                pending[rows] = self._after(z, weights.after_mlp)
        return residual, pending

    def _whole(self, h: Tensor) -> bool:
        """Whether the MLP takes all rows at once; a dropout mask is made for all of them."""
        return h.shape[0] <= self.call.tile or self.call.dropout is not None

    def _tiles(self, h: Tensor) -> list[slice]:
        return [slice(start, start + self.call.tile) for start in range(0, h.shape[0], self.call.tile)]

    @contextmanager
    def _dense_mlp(self, weights: LayerWeights) -> Iterator[None]:
        """The MLP's weights are dequantised once for all tiles."""
        groups = [g for g in (weights.gate_up, weights.down) if g.rebuilt]
        try:
            for group in groups:
                lora = self.call.lora(group)
                group.hold(0 if lora is None else lora.width)
            yield
        finally:
            for group in groups:
                group.release()

    def _keep(
        self, h: Tensor | Parked, h2: Tensor | None, attention: AttentionParts, mlp: MlpParts, level: str
    ) -> None:
        """Let go of what the level does not keep."""
        depth = LEVELS.index(level)
        if depth >= LEVELS.index("mlp"):
            mlp.gate_up = mlp.thin_gate_up = None
        if depth >= LEVELS.index("attention_mlp"):
            attention.qkv = attention.thin_qkv = None
            if not isinstance(attention.kept, Tensor):  # a recorded graph would hold q, k and v
                attention.out = attention.kept = None
        self._kept.append(KeptLayer(h, h2, attention, mlp))

    def _park(self, h: Tensor) -> Parked:
        if h.is_cuda:
            self._parking = parking_beside(h.device)
        return Parked(h, self._parking)

    def _join_copies(self) -> None:
        """An abandoned pass frees memory that copies still read or write. The allocator waits for the stream that computes
        before it unmaps any, not for theirs."""
        if self._parking is not None:
            torch.cuda.current_stream(self.final_norm.device).wait_stream(self._parking.stream)

    # -- from residual to input and back -----------------------------------------------------------------------------

    def _enter(
        self, h: Tensor, pending: Tensor | None, norm: Tensor | None, group: ProjectionGroup, lora: GroupLora | None
    ) -> tuple[Tensor, Tensor]:
        """The residual h + pending (N, H), and the input of a group: its norm, with the room the group asks for."""
        x = group.room(h, lora)
        inner = x[:, : h.shape[1]]
        if norm is not None:
            return add_norm(h, pending, norm, self.spec.norm_eps, self.spec.norm, out=inner), x
        total = h if pending is None else h + pending
        inner.copy_(total)
        return total, x

    def _leave(self, dx: Tensor, h: Tensor, norm: Tensor | None, dh: Tensor) -> None:
        """Back through `_enter`: dh (N, H) gains what dx gives, and dx (N, H) becomes the group's input again."""
        if norm is not None:
            norm_backward(dx, h, norm, self.spec.norm_eps, self.spec.norm, residual=dh, out=dh, again=dx)
        else:
            dh += dx
            dx.copy_(h)

    def _after(self, y: Tensor, norm: Tensor | None) -> Tensor:
        """A block's output through the norm that some families have there."""
        if norm is None:
            return y
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        add_norm(y, None, norm, self.spec.norm_eps, self.spec.norm, out=out)
        return out

    def _before(self, dh: Tensor, y: Tensor | None, norm: Tensor | None, room: int) -> Tensor:
        """Back through `_after`: the block's output gradient (N, H + room), which is dh itself without such a norm."""
        if norm is None:
            return dh
        dy = dh.new_empty(dh.shape[0], y.shape[1] + room)
        norm_backward(
            dh[:, : y.shape[1]], y, norm, self.spec.norm_eps, self.spec.norm, residual=None, out=dy[:, : y.shape[1]]
        )
        return dy

    # -- backward ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def backward(self, grad: Tensor) -> None:
        """Add every adapter's gradient to the sink, from that of the final hidden states (N or M, H)."""
        hidden = self._final.shape[1]
        room = max((padded(lora.rank) for lora in self.call.loras.values() if lora is not None), default=0)
        wide = grad.new_empty(self._count, hidden + room)
        inner = wide[:, :hidden]
        through = inner if self.rows is None else torch.empty_like(grad)
        norm_backward(
            grad,
            self._final,
            self.final_norm,
            self.spec.norm_eps,
            self.spec.norm,
            residual=None,
            out=through,
        )
        if self.rows is not None:
            inner.zero_().index_copy_(0, self.rows, through)
        self._final = None
        first = min((i for i, layer in enumerate(self.layers) if self._adapted(layer)), default=self.spec.layers)
        try:
            for index in reversed(range(first, self.spec.layers)):
                kept = self._kept.pop()
                if isinstance(kept.h, Parked):
                    kept.h.fetch()  # under way already but for the last layer's
                if self._kept and isinstance(self._kept[-1].h, Parked):
                    self._kept[-1].h.fetch()
                self._layer_backward(index, kept, wide, last=index == first)
        finally:
            self._join_copies()
            self._kept.clear()

    def _adapted(self, layer: LayerWeights) -> bool:
        return any(self.call.lora(group) is not None for group in layer.groups)

    def _layer_backward(self, index: int, kept: KeptLayer, dh: Tensor, *, last: bool) -> None:
        """dh (N, H + room): the gradient of this layer's output becomes that of its input, in place."""
        weights = self.layers[index]
        h = kept.h.get() if isinstance(kept.h, Parked) else kept.h
        attention, recomputed = kept.attention, None
        if attention.out is None:
            _, x = self._enter(h, None, weights.before_attention, weights.qkv, self.call.lora(weights.qkv))
            attention, y = self._attention(index, x, keep=True)
            recomputed = self._after(y, weights.after_attention)
            del x, y
        if kept.h2 is not None:
            self._mlp_backward(weights, kept.h2, None, kept.mlp, dh)
        elif self._whole(h):
            self._mlp_backward(weights, h, recomputed, kept.mlp, dh)
        else:
            with self._dense_mlp(weights):
                for rows in self._tiles(h):
                    self._mlp_backward(weights, h[rows], recomputed[rows], MlpParts(), dh[rows])
        del recomputed
        if attention.qkv is None:
            _, x = self._enter(h, None, weights.before_attention, weights.qkv, self.call.lora(weights.qkv))
            attention.qkv, attention.thin_qkv = weights.qkv.forward(x, self.call.lora(weights.qkv))
            del x
            if weights.heads.q_norm is None:
                attention.qkv = rotate_qk(attention.qkv, weights.heads, self._rotation(index))
        self._attention_backward(index, h, attention, dh, last=last)

    def _mlp_backward(
        self, weights: LayerWeights, h: Tensor, pending: Tensor | None, mlp: MlpParts, dh: Tensor
    ) -> None:
        """dh (N, H + room), in place, through the MLP over the residual h + pending."""
        lora, sink, hidden = self.call.lora, self.call.sink, h.shape[1]
        h2 = h
        if mlp.gate_up is None:
            h2, x = self._enter(h, pending, weights.before_mlp, weights.gate_up, lora(weights.gate_up))
            mlp.gate_up, mlp.thin_gate_up = weights.gate_up.forward(x, lora(weights.gate_up))
            del x
            if weights.after_mlp is not None and mlp.projected is None:
                mlp.projected, _ = weights.down.forward(gated(mlp.gate_up, self.spec.activation), lora(weights.down))
        dz = self._before(dh, mlp.projected, weights.after_mlp, dh.shape[1] - hidden)
        product, q = weights.down.backward_input(dz, lora(weights.down))
        gated_backward_(mlp.gate_up, product, self.spec.activation)
        weights.down.backward_adapter(q, dz, product, mlp.thin_down, lora(weights.down), sink)
        del product, dz
        dx, q = weights.gate_up.backward_input(mlp.gate_up, lora(weights.gate_up))
        self._leave(dx, h2, weights.before_mlp, dh[:, :hidden])
        weights.gate_up.backward_adapter(q, mlp.gate_up, dx, mlp.thin_gate_up, lora(weights.gate_up), sink)
        mlp.gate_up = mlp.thin_gate_up = mlp.projected = None  # attention comes next and needs the room

    def _attention_backward(self, index: int, h: Tensor, attention: AttentionParts, dh: Tensor, *, last: bool) -> None:
        weights, spec, hidden = self.layers[index], self.spec, h.shape[1]
        lora, sink, rotation = self.call.lora, self.call.sink, self._rotation(index)
        dy = self._before(dh, attention.projected, weights.after_attention, dh.shape[1] - hidden)
        dout, q = weights.out.backward_input(dy, lora(weights.out))
        flat = attention.out.flatten(1)
        weights.out.backward_adapter(q, dy, flat, attention.thin_out, lora(weights.out), sink)
        del dy
        raw = attention.qkv
        rotated = raw if weights.heads.q_norm is None else rotate_qk(raw, weights.heads, rotation)
        dqkv = torch.empty_like(raw)
        self.call.attend.backward(
            dout.view(attention.out.shape),
            *weights.heads.split(rotated),
            attention.out,
            attention.kept,
            scale=spec.attention_scale,
            window=spec.windows[index],
            softcap=spec.attention_softcap,
            into=weights.heads.split(dqkv),
        )
        attention.out = attention.kept = None
        rotate_back_(dqkv, raw, weights.heads, rotation)
        del rotated, raw, dout
        dx, q = weights.qkv.backward_input(dqkv, lora(weights.qkv), need=not last)
        if last:
            _, x = self._enter(h, None, weights.before_attention, weights.qkv, None)
        else:
            self._leave(dx, h, weights.before_attention, dh[:, :hidden])
            x = dx
        weights.qkv.backward_adapter(q, dqkv, x, attention.thin_qkv, lora(weights.qkv), sink)
