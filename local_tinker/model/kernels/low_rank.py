"""The adapter's part of a decoding step's products: [W; A] gives y = W x and t = A x in one product, and s B t is added
where y is read next, so that an adapter costs no pass of its own; where nothing reads y before it is added to the
residual, by the kernel here.

Shapes: B rows, O outputs, R rank (padded to 16 or more).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import jit, tl, triton_ready
from .dependent import dependent, follow


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to y (B, O): s * B t.

    Attributes:
        thin: (B, parts * R), t of each part side by side. up: (O, R), the B of the parts under each other; zeros where
            a part has no adapter. edges: outputs before each part, O at the end.
    """

    thin: Tensor
    up: Tensor
    scale: float
    edges: tuple[int, ...]

    def add_to(self, y: Tensor) -> Tensor:
        """y + s B t, with one rounding, as `model.lora` adds it."""
        rank = self.up.shape[1]
        for part in range(len(self.edges) - 1):
            cut = slice(self.edges[part], self.edges[part + 1])
            thin = self.thin[:, part * rank : (part + 1) * rank]
            y[:, cut] = torch.addmm(y[:, cut], thin, self.up[cut].t(), alpha=self.scale)
        return y


@jit
def load_up(up_row, RANK: tl.constexpr):
    """up_row (BN,) pointers to rows of B -> B^T (RANK, BN)."""
    return tl.load(up_row[None, :] + tl.arange(0, RANK)[:, None])


@jit
def _sum_slices(at, mask, step, SLICES: tl.constexpr, TYPE: tl.constexpr):
    """What stands at `at` in every slice, added up and rounded."""
    total = tl.load(at, mask=mask, other=0.0)
    for i in tl.static_range(1, SLICES):
        total += tl.load(at + i * step, mask=mask, other=0.0)
    return total.to(TYPE)


@jit
def low_rank_tile(thin_row, up, ok, RANK: tl.constexpr, slice_stride=0, SLICES: tl.constexpr = 1):
    """thin_row (BM, 1) pointers and B^T (RANK, BN) -> t B^T (BM, BN) in fp32; t is the sum of SLICES."""
    thin = _sum_slices(thin_row + tl.arange(0, RANK)[None, :], ok[:, None], slice_stride, SLICES, up.dtype)
    return tl.dot(thin, up, input_precision="ieee")


@jit
def tile_of(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """This program's rows and columns, which rows there are, and which of the tile."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = row < rows
    return row, column, ok, ok[:, None] & (column < columns)[None, :]


def add_low_rank(y: Tensor, low_rank: LowRank) -> Tensor:
    """y (B, O) += s B t in place, where no other kernel reads y next."""
    if not triton_ready(y.device.type) or y.dtype == torch.float64 or len(low_rank.edges) != 2:
        return low_rank.add_to(y)
    _launch(y, low_rank.thin, low_rank.up, y, low_rank.scale, slices=1)
    return y


def join_slices(slices: Tensor, outputs: int, up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """slices (S, B, >= O + R) fp32, the products of [W; A] with one slice of the inputs each -> W x + s B A x (B, O).

    W x and A x are rounded to `dtype` as one product would be.

    Args:
        up: B (O, R).
    """
    if not triton_ready(slices.device.type) or dtype == torch.float64:
        return join_slices_reference(slices, outputs, up, scale, dtype)
    out = torch.empty(slices.shape[1], outputs, dtype=dtype, device=slices.device)
    _launch(slices, slices[..., outputs:], up, out, scale, slices=slices.shape[0])
    return out


def join_slices_reference(slices, outputs, up, scale, dtype):
    """`join_slices` in torch operations."""
    whole = slices.sum(0).to(dtype)
    thin = whole[:, outputs : outputs + up.shape[1]]
    return LowRank(thin, up, scale, (0, outputs)).add_to(whole[:, :outputs].contiguous())


def _launch(y: Tensor, thin: Tensor, up: Tensor, out: Tensor, scale: float, *, slices: int) -> None:
    count, outputs = out.shape
    bm, bn, warps = (16, 32, 2) if count <= 64 else (64, 32, 8)
    _add_low_rank[(-(-count // bm), -(-outputs // bn))](
        y, thin, up, out, count, outputs, y.stride(-2), thin.stride(-2), out.stride(0), y.stride(0), scale,
        RANK=up.shape[1], SLICES=slices, BM=bm, BN=bn, num_warps=warps,
        **dependent(out.device.type),
    )  # fmt: skip


@jit
def _add_low_rank(
    Y, THIN, UP, OUT, rows, outputs, y_stride, thin_stride, out_stride, slice_stride, scale, RANK: tl.constexpr,
    SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """OUT = Y + scale * THIN UP^T, Y and THIN being sums of SLICES."""
    kind: tl.constexpr = OUT.dtype.element_ty
    row, c, ok, mask = tile_of(rows, outputs, BM, BN)
    up = load_up(UP + tl.minimum(c, outputs - 1) * RANK, RANK)
    follow(DEPENDENT)
    y = _sum_slices(Y + row[:, None] * y_stride + c[None, :], mask, slice_stride, SLICES, kind).to(tl.float32)
    y += scale * low_rank_tile(THIN + row[:, None] * thin_stride, up, ok, RANK, slice_stride, SLICES)
    tl.store(OUT + row[:, None] * out_stride + c[None, :], y.to(kind), mask=mask)
