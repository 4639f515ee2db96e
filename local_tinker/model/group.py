"""Frozen projections of one input, computed as one product with their adapters: y = x W^T + b + s (x A^T) B^T.

LoRA (Hu et al., arXiv 2106.09685) stays unmerged: a dequantised weight sits on the bf16 grid, and small updates added to
it would be rounded away. Two forms compute the same thing:

- "separate": the base product, then a thin product a member. Any device and type, dropout too.
- "fused" (half precision on a card): the adapter rides inside the base's product. Several members: [x | x A^T] [W | s B]^T,
  so no pass over y is needed for the adapters, and the backward's product with [W | s B] gives dx and s dy B at once.
  One member: A's rows under W's give y and x A^T at once, and backward is [dy | s dy B] [W ; A].

Shapes: N packed tokens, I inputs, O outputs of all members, R rank, m adapted members, T = m R rounded up to 8.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .dims import rows_below
from .kernels import KERNEL_DTYPES
from .kernels.lora import add_diagonal, block_diagonal
from .kernels.nf4 import nf4_serves
from .linear import FrozenLinear, packed_together
from .lora import LoraDropout, LoraPair

ALIGN = 8  # elements; rows of half precision then start at 16 bytes, which fast products ask for


def padded(width: int) -> int:
    return -(-width // ALIGN) * ALIGN


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of equal width on top of each other; a view where they already lie so, which flat adapters do."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not _adjacent(parts):
        return torch.cat(list(parts))
    return first.as_strided((sum(p.shape[0] for p in parts), first.shape[1]), first.stride())


def _adjacent(parts: Sequence[Tensor]) -> bool:
    ends = [p.data_ptr() + p.numel() * p.element_size() for p in parts]
    one = len({p.untyped_storage().data_ptr() for p in parts}) == 1
    return (
        one
        and all(p.is_contiguous() for p in parts)
        and all(end == p.data_ptr() for end, p in zip(ends, parts[1:], strict=False))
    )


@dataclass(frozen=True, eq=False)
class GroupLora:
    """The adapters of one group in one pass, or in all passes of a call, during which their values stay.

    Attributes:
        members: which of the group's linears are adapted. a: (m R, I). bs: (O_i, R) each.
        scale: multiplies B A x. dropout: on each adapter's input, or None.
    """

    members: tuple[int, ...]
    a: Tensor
    bs: tuple[Tensor, ...]
    scale: float
    dropout: LoraDropout | None

    @property
    def rank(self) -> int:
        return self.bs[0].shape[1]

    @property
    def width(self) -> int:
        return self.rank * len(self.members)


class ProjectionGroup:
    """Linears that read the same input; `paths` name them in the transformers model.

    While `hold()` is in force the dequantised weights stay in one buffer of which every member's `dense()` is a view,
    with room below them and, for several members, beside them for an adapter. It holds the bits that dequantising gives:
    residency changes speed and memory, never a result.

    Attributes:
        packed: all weights as one launch reads them, None where they are not NF4.
        below: address of the A matrices that stand below the weights, or None: a pass of another adapter has written
            there since, or the buffer is new.
    """

    def __init__(self, paths: tuple[str, ...], linears: tuple[FrozenLinear, ...]) -> None:
        self.paths, self.linears = paths, linears
        self.inputs = linears[0].in_features
        self.outputs = sum(linear.out_features for linear in linears)
        edges = [0]
        for linear in linears:
            edges.append(edges[-1] + linear.out_features)
        self.starts = tuple(edges)
        self._resident: Tensor | None = None
        self.packed = packed_together(linears)
        self.below: int | None = None
        # what stands in the buffer that is held: backward and later micro-batches of a call find it there
        self._ridden: weakref.ref[GroupLora] | None = None
        self._bias = self._stack_bias()

    def _stack_bias(self) -> Tensor | None:
        if all(linear.bias is None for linear in self.linears):
            return None
        like = next(linear.bias for linear in self.linears if linear.bias is not None)
        return torch.cat(
            [like.new_zeros(li.out_features) if li.bias is None else li.bias.detach() for li in self.linears]
        )

    # -- weights -----------------------------------------------------------------------------------------------------

    @property
    def single(self) -> bool:
        return len(self.linears) == 1

    @property
    def held(self) -> bool:
        return self._resident is not None

    @property
    def rebuilt(self) -> bool:
        """Whether every product makes the weights anew."""
        return not self.held and self.linears[0].storage != "dense"

    def hold(self, width: int = 0) -> None:
        """Keep the weights dense, with room for adapters of `width` columns in all (R a member)."""
        room = self._room_for(width)
        if self._resident is None or self.spare_rows < room:
            self.release()
            self._resident = self._dequantised(room)
            for linear, start in zip(self.linears, self.starts, strict=False):
                linear.share(self._resident[start : start + linear.out_features, : self.inputs])

    def release(self) -> None:
        self._resident = self.below = self._ridden = None
        for linear in self.linears:
            linear.release()

    @property
    def spare_rows(self) -> int:
        """Rows below the weights that are held."""
        return self._resident.shape[0] - self.outputs

    def _room_for(self, width: int) -> int:
        if self.single and self.fusable:
            return rows_below(self.outputs, self.inputs, padded(width))
        return padded(width)

    def with_below(self, rows: int) -> Tensor:
        """[W ; room] (O + rows, I) of the buffer that is held."""
        return self._resident[: self.outputs + rows, : self.inputs]

    @property
    def bias(self) -> Tensor | None:
        """(O,)"""
        return self._bias

    def _dequantised(self, room: int) -> Tensor:
        """A new buffer (O + room, I), for several members whose adapter may ride inside (O + room, I + room); the room is
        not filled."""
        shape = (self.outputs + room, self.inputs + (0 if self.single or not self.fusable else room))
        first = self.linears[0]
        buffer = torch.empty(shape, dtype=first.dtype, device=first.weight.device)
        weights = buffer[: self.outputs, : self.inputs]
        if self.packed is not None and nf4_serves(weights):
            self.packed.dense_into(weights)
        else:
            for linear, start in zip(self.linears, self.starts, strict=False):
                linear.dense_into(weights[start : start + linear.out_features])
        return buffer

    def dense(self) -> Tensor:
        """(O, I), rows possibly part of something wider."""
        if self.single and self._resident is None:
            return self.linears[0].dense()
        buffer = self._resident if self._resident is not None else self._dequantised(0)
        return buffer[: self.outputs, : self.inputs]

    def _with_adapter(self, lora: GroupLora) -> Tensor:
        """[W ; A ; 0] (O + T, I) for one member, [W | s B | 0] (O, I + T) for several."""
        room = padded(lora.width)
        if self._resident is None:
            buffer, there = self._dequantised(room), False
        else:
            self.hold(lora.width)
            buffer, there = self._resident, self._rides(lora)
        buffer = buffer[: self.outputs + room] if self.single else buffer[: self.outputs, : self.inputs + room]
        if not there:
            self._put_adapter(lora, buffer)
            self._ridden = None if self._resident is None else weakref.ref(lora)
        return buffer

    def _rides(self, lora: GroupLora) -> bool:
        """Whether this adapter stands in the buffer still. Decoding lays its own below the weights and says so."""
        same = self._ridden is not None and self._ridden() is lora
        return same and (not self.single or self.below == lora.a.data_ptr())

    def _put_adapter(self, lora: GroupLora, buffer: Tensor) -> None:
        if self.single:
            buffer[self.outputs : self.outputs + lora.rank].copy_(lora.a)
            self.below = lora.a.data_ptr()
            if buffer.shape[0] > self.outputs + lora.rank:
                buffer[self.outputs + lora.rank :].zero_()
        else:
            columns = [(b, self.starts[i]) for i, b in zip(lora.members, lora.bs, strict=True)]
            block_diagonal(columns, lora.scale, buffer[:, self.inputs :])

    # -- one pass ----------------------------------------------------------------------------------------------------

    def lora(self, pairs: Mapping[str, LoraPair], scale: float, dropout: LoraDropout | None = None) -> GroupLora | None:
        members = tuple(i for i, path in enumerate(self.paths) if path in pairs)
        if not members:
            return None
        found = [pairs[self.paths[i]] for i in members]
        return GroupLora(
            members, stacked([a.detach() for a, _ in found]), tuple(b.detach() for _, b in found), scale, dropout
        )

    def fused(self, lora: GroupLora | None) -> bool:
        """Whether this pass takes the fused form."""
        return lora is not None and lora.dropout is None and self.fusable

    @property
    def fusable(self) -> bool:
        first = self.linears[0]
        return first.weight.is_cuda and first.dtype in KERNEL_DTYPES

    def room(self, like: Tensor, lora: GroupLora | None) -> Tensor:
        """A buffer for the input: (N, I), or (N, I + T) where the fused form wants room for x A^T. Fill the first I."""
        extra = padded(lora.width) if self.fused(lora) and not self.single else 0
        return like.new_empty(like.shape[0], self.inputs + extra)

    def forward(self, x: Tensor, lora: GroupLora | None, *, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x as `room` gave it -> y (N, O) and thin = x A^T (N, m R), which backward wants; None without adapters.

        The thin product is a copy: as a part of the wide buffer it was made in, it would hold all of that.

        Args:
            out: where y may go; the fused form makes its own.
        """
        if lora is None:
            return self._base(x, out), None
        if not self.fused(lora):
            return self._forward_separate(x, lora, out)
        weight, width = self._with_adapter(lora), lora.width
        if self.single:
            bias = None if self._bias is None else F.pad(self._bias, (0, weight.shape[0] - self.outputs))
            both = F.linear(x, weight, bias)
            y, thin = both[:, : self.outputs], both[:, self.outputs : self.outputs + width]
            y.addmm_(thin, lora.bs[0].t(), alpha=lora.scale)
            return y, thin.contiguous()
        thin = x[:, self.inputs : self.inputs + width]
        torch.mm(x[:, : self.inputs], lora.a.t(), out=thin)
        if padded(width) > width:
            x[:, self.inputs + width :].zero_()
        return F.linear(x, weight, self._bias), thin.contiguous()

    def _base(self, x: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            return F.linear(x, self.dense(), self._bias)
        weight = self.dense().t()
        return torch.mm(x, weight, out=out) if self._bias is None else torch.addmm(self._bias, x, weight, out=out)

    def _base_backward(self, dy: Tensor) -> Tensor:
        return dy @ self.dense()

    def _forward_separate(self, x: Tensor, lora: GroupLora, out: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self._base(x, out)
        thin = self._thin(x, lora)
        for slot, (i, b) in enumerate(zip(lora.members, lora.bs, strict=True)):
            rows = y[:, self.starts[i] : self.starts[i + 1]]
            rows.addmm_(thin[:, slot * lora.rank : (slot + 1) * lora.rank], b.t(), alpha=lora.scale)
        return y, thin

    def _thin(self, x: Tensor, lora: GroupLora) -> Tensor:
        """x A^T (N, m R), each member's through its own dropout."""
        if lora.dropout is None:
            return x @ lora.a.t()
        parts = lora.a.split(lora.rank)
        masked = [lora.dropout(x, self.paths[i]) @ a.t() for i, a in zip(lora.members, parts, strict=True)]
        return torch.cat(masked, dim=1)

    def backward_input(
        self, dy: Tensor, lora: GroupLora | None, *, need: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """-> dx (N, I), rows possibly part of something wider, and q = s dy B (N, m R), which `backward_adapter` wants.

        Args:
            dy: (N, O), or (N, O + T) with room after the gradient, which the fused form of one member fills.
            need: False leaves dx out.
        """
        grad = dy[:, : self.outputs]
        if lora is None:
            return (self._base_backward(grad) if need else None), None
        if not self.fused(lora):
            return self._backward_separate(grad, lora, need)
        weight, width = self._with_adapter(lora), lora.width
        if self.single:
            if dy.shape[1] != weight.shape[0]:
                dy = F.pad(grad, (0, weight.shape[0] - self.outputs))
            q = dy[:, self.outputs : self.outputs + width]
            q.addmm_(grad, lora.bs[0], beta=0, alpha=lora.scale)
            if padded(width) > width:
                dy[:, self.outputs + width :].zero_()
            return (dy @ weight if need else None), q
        if not need:
            return None, grad @ weight[:, self.inputs : self.inputs + width]
        both = grad @ weight
        dx, q = both[:, : self.inputs], both[:, self.inputs : self.inputs + width]
        return dx.addmm_(q, lora.a), q

    def _backward_separate(self, dy: Tensor, lora: GroupLora, need: bool) -> tuple[Tensor | None, Tensor]:
        q = torch.cat(
            [
                (dy[:, self.starts[i] : self.starts[i + 1]] @ b).mul_(lora.scale)
                for i, b in zip(lora.members, lora.bs, strict=True)
            ],
            dim=1,
        )
        if not need:
            return None, q
        dx = self._base_backward(dy)
        if lora.dropout is None:
            return dx.addmm_(q, lora.a), q
        for i, part, a in zip(lora.members, q.split(lora.rank, dim=1), lora.a.split(lora.rank), strict=True):
            dx += lora.dropout(part @ a, self.paths[i])  # a mask is its own transpose
        return dx, q

    def backward_adapter(
        self,
        q: Tensor | None,
        dy: Tensor,
        x: Tensor,
        thin: Tensor | None,
        lora: GroupLora | None,
        sink: Mapping[str, LoraPair],
    ) -> None:
        """Add dA = q^T x and dB = s dy^T (x A^T) to `sink`, in its type.

        Args:
            x: (N, I) the input. thin: as `forward` gave it; None computes it again.
        """
        if lora is None:
            return
        dy, thin = dy[:, : self.outputs], self._thin(x, lora) if thin is None else thin
        targets = [sink[self.paths[i]] for i in lora.members]
        if lora.dropout is None:
            rows = stacked_target([a for a, _ in targets])
            for target, part in zip(rows, q.split([a.shape[0] for a in rows], dim=1), strict=True):
                _add_product(target, part.t(), x)
        else:
            for i, part, (a, _) in zip(lora.members, q.split(lora.rank, dim=1), targets, strict=True):
                _add_product(a, part.t(), lora.dropout(x, self.paths[i]))
        if self.single:
            return _add_product(targets[0][1], dy.t(), thin, lora.scale)
        db = _product(dy.t(), thin)  # off-diagonal blocks are computed too: one product that reads dy once
        add_diagonal(db, [(b, self.starts[i]) for i, (_, b) in zip(lora.members, targets, strict=True)], lora.scale)


def stacked_target(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """One tensor to add to where the parts lie on top of each other, else the parts."""
    return [stacked(parts)] if len(parts) == 1 or _adjacent(parts) else parts


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, in fp32 where half precision on a card can give it."""
    return torch.mm(a, b, out_dtype=torch.float32) if _widens(a) else a @ b


def _add_product(target: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """target += scale a b in the target's type."""
    if _widens(a) and target.dtype == torch.float32:
        torch.addmm(target, a, b, out_dtype=torch.float32, alpha=scale, out=target)
    elif target.dtype == a.dtype:
        target.addmm_(a, b, alpha=scale)
    else:
        target.add_(_product(a, b), alpha=scale)


def _widens(a: Tensor) -> bool:
    return a.is_cuda and a.dtype in KERNEL_DTYPES
