"""The adapter's columns of a wide projection: s B of every adapted member, block-diagonal, zero elsewhere.

Shapes: O outputs of the group, R rank of one member, W columns of the block (R a member, rounded up to 8).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import serves, tl, triton

_ROWS = 64


def block_diagonal_reference(pairs, scale, out):
    out.zero_()
    for i, (b, start) in enumerate(pairs):
        torch.mul(b, scale, out=out[start : start + b.shape[0], i * b.shape[1] : (i + 1) * b.shape[1]])


def block_diagonal(members: Sequence[tuple[Tensor, int]], scale: float, out: Tensor) -> None:
    """out (O, W) = blocks of scale * B on the diagonal.

    Args:
        members: (B (O_i, R), first row) of each adapted member, in order; at most three.
    """
    if not serves(out) or len(members) > 3:
        return block_diagonal_reference(members, scale, out)
    rank = members[0][0].shape[1]
    filled = [*members, *([(members[0][0][:0], 0)] * (3 - len(members)))]
    bs, starts = zip(*filled, strict=True)
    stops = [start + b.shape[0] for b, start in filled]
    _block_diagonal[(triton.cdiv(out.shape[0], _ROWS),)](
        *bs, out, out.shape[0], out.shape[1], out.stride(0), *starts, *stops, scale,
        R=rank, ROWS=_ROWS, WB=triton.next_power_of_2(out.shape[1]), num_warps=4,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _block_diagonal(
        B0, B1, B2, OUT, rows, W, out_row, start0, start1, start2, stop0, stop1, stop2, scale,
        R: tl.constexpr, ROWS: tl.constexpr, WB: tl.constexpr,
    ):  # fmt: skip
        o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        c = tl.arange(0, WB)[None, :]
        b = tl.load(B0 + (o - start0) * R + c, mask=(o >= start0) & (o < stop0) & (c < R), other=0.0)
        b += tl.load(
            B1 + (o - start1) * R + c - R, mask=(o >= start1) & (o < stop1) & (c >= R) & (c < 2 * R), other=0.0
        )
        b += tl.load(
            B2 + (o - start2) * R + c - 2 * R, mask=(o >= start2) & (o < stop2) & (c >= 2 * R) & (c < 3 * R), other=0.0
        )
        value = (b.to(tl.float32) * scale).to(OUT.dtype.element_ty)
        tl.store(OUT + o.to(tl.int64) * out_row + c, value, mask=(o < rows) & (c < W))
