"""The adapter's columns of a wide projection: s B of every adapted member, block-diagonal, zero elsewhere; and the
gradient of such a block given back to its members.

Shapes: O outputs of the group, R rank of one member, W columns of the block (R a member, rounded up to 8).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import power_of_two, serves, tl, triton, triton_ready
from .launch import kernel

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
    _block_diagonal[(-(-out.shape[0] // _ROWS),)](
        *bs, out, out.shape[0], out.shape[1], out.stride(0), *starts, *stops, scale,
        R=rank, ROWS=_ROWS, WB=power_of_two(out.shape[1]), num_warps=4,
    )  # fmt: skip


def add_diagonal_reference(wide, members, scale):
    for i, (b, start) in enumerate(members):
        rank = b.shape[1]
        b.add_(wide[start : start + b.shape[0], i * rank : (i + 1) * rank], alpha=scale)


def add_diagonal(wide: Tensor, members: Sequence[tuple[Tensor, int]], scale: float) -> None:
    """Every member's B (O_i, R) gains scale times its block on the diagonal of `wide` (O, m R).

    Args:
        members: (B, first row) of each adapted member, in order; at most three.
    """
    if wide.dtype != torch.float32 or not triton_ready(wide.device.type) or len(members) > 3:
        return add_diagonal_reference(wide, members, scale)
    bs, starts = zip(*members, *[members[0]] * (3 - len(members)), strict=True)
    rank, most = bs[0].shape[1], max(b.shape[0] for b, _ in members)
    _add_diagonal[(-(-most // _ROWS), len(members))](
        wide, *bs, wide.stride(0), *starts, *(b.shape[0] for b in bs), scale,
        R=rank, ROWS=_ROWS, RB=power_of_two(rank), num_warps=4,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _add_block(
        WIDE, B, wide_row, start, rows, member, scale, R: tl.constexpr, ROWS: tl.constexpr, RB: tl.constexpr
    ):
        o = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        c = tl.arange(0, RB)[None, :]
        ok = (o < rows) & (c < R)
        value = tl.load(WIDE + (start + o) * wide_row + member * R + c, mask=ok)
        at = B + o * R + c
        tl.store(at, tl.load(at, mask=ok) + scale * value, mask=ok)

    @kernel
    def _add_diagonal(
        WIDE, B0, B1, B2, wide_row, start0, start1, start2, rows0, rows1, rows2, scale,
        R: tl.constexpr, ROWS: tl.constexpr, RB: tl.constexpr,
    ):  # fmt: skip
        member = tl.program_id(1)
        if member == 0:
            _add_block(WIDE, B0, wide_row, start0, rows0, 0, scale, R, ROWS, RB)
        elif member == 1:
            _add_block(WIDE, B1, wide_row, start1, rows1, 1, scale, R, ROWS, RB)
        else:
            _add_block(WIDE, B2, wide_row, start2, rows2, 2, scale, R, ROWS, RB)

    @kernel
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
