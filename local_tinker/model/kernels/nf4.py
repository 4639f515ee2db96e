"""NF4 with double-quantised absmax (QLoRA, arXiv 2305.14314, section 3) -> rows of a dense buffer, in one launch for all
weights that read the same input.

Bit-equal to bitsandbytes, whose three launches (absmax, its offset, the weights) and temporary buffers it replaces:
products and sums are rounded one by one, so fused multiply-adds are off.

Shapes: M rows of input, O outputs, I inputs; two weights a byte, the first in the high half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import KERNEL_DTYPES, tl, triton, triton_ready
from .launch import kernel
from .nf4_rows import nf4_rows, rows_serve

_BLOCK = 2048  # bytes of one program


def nf4_serves(out: Tensor) -> bool:
    return out.dtype in KERNEL_DTYPES and triton_ready(out.device.type)


def nf4_dense_reference(packed: Tensor, state: Any, out: Tensor) -> None:
    absmax = (
        state.state2.code[state.absmax.long()]
        * state.state2.absmax.repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    )
    absmax = absmax + state.offset
    codes = packed.view(-1).long()
    values = state.code[torch.stack([codes >> 4, codes & 15], dim=1).view(-1)].view(-1, state.blocksize)
    out.copy_((values * absmax[:, None]).to(out.dtype).view(out.shape))


class Packed:
    """Up to three weights of the same inputs, to dequantise on top of each other in one launch.

    Args:
        parts: bitsandbytes' packed weights and QuantState of each, with nested statistics.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Any]]) -> None:
        assert 1 <= len(parts) <= 3, f"{len(parts)} weights for one launch"
        self._parts = parts
        filled = [*parts, *[parts[0]] * (3 - len(parts))]
        state = parts[0][1]  # both tables of levels belong to the format, not to the weight
        self._arguments = tuple(
            value for q, s in filled for value in (q, s.absmax, s.state2.absmax, s.offset, q.numel())
        ) + (state.state2.code, state.code)
        self._grid = (sum(-(-packed.numel() // _BLOCK) for packed, _ in parts),)
        self._sizes = dict(PARTS=len(parts), BS=state.blocksize, BS2=state.state2.blocksize, BLOCK=_BLOCK)

    def multiplies(self, x: Tensor) -> bool:
        """Whether `multiply` takes these rows."""
        return rows_serve(x, self._parts)

    def multiply(self, x: Tensor, bias: Tensor | None, below: Tensor | None) -> Tensor:
        """x (M, I) -> [x W^T + b | x B^T], read from the four-bit values; see `nf4_rows`."""
        return nf4_rows(x, self._parts, bias, below)

    def dense_into(self, out: Tensor) -> None:
        """Fill `out` (O, I), whose rows may be part of something wider."""
        if not nf4_serves(out):
            rows = [2 * packed.numel() // out.shape[1] for packed, _ in self._parts]
            for (packed, state), part in zip(self._parts, out.split(rows), strict=True):
                nf4_dense_reference(packed, state, part)
            return
        _nf4_dense[self._grid](
            *self._arguments, out, out.stride(0), **self._sizes, K=out.shape[1], num_warps=8, enable_fp_fusion=False
        )


if triton is not None:

    @kernel
    def _nf4_dense(
        Q0, CODES0, SCALE0, OFFSET0, count0, Q1, CODES1, SCALE1, OFFSET1, count1, Q2, CODES2, SCALE2, OFFSET2, count2,
        TABLE, LEVELS, OUT, row_stride, PARTS: tl.constexpr, K: tl.constexpr, BS: tl.constexpr, BS2: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        if PARTS == 1:
            _nf4_block(Q0, CODES0, SCALE0, OFFSET0, count0, TABLE, LEVELS, OUT, row_stride, block, K, BS, BS2, BLOCK)
        else:
            first, second = tl.cdiv(count0, BLOCK), tl.cdiv(count1, BLOCK)
            rows = (2 * count0 // K).to(tl.int64) * row_stride
            if block < first:
                _nf4_block(
                    Q0, CODES0, SCALE0, OFFSET0, count0, TABLE, LEVELS, OUT, row_stride, block, K, BS, BS2, BLOCK
                )
            elif block < first + second:
                _nf4_block(
                    Q1, CODES1, SCALE1, OFFSET1, count1, TABLE, LEVELS, OUT + rows, row_stride, block - first, K, BS, BS2,
                    BLOCK,
                )  # fmt: skip
            elif PARTS == 3:
                rows += (2 * count1 // K).to(tl.int64) * row_stride
                _nf4_block(
                    Q2, CODES2, SCALE2, OFFSET2, count2, TABLE, LEVELS, OUT + rows, row_stride, block - first - second, K,
                    BS, BS2, BLOCK,
                )  # fmt: skip

    @triton.jit
    def _nf4_block(
        Q, CODES, SCALE, OFFSET, count, TABLE, LEVELS, OUT, row_stride, block,
        K: tl.constexpr, BS: tl.constexpr, BS2: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK bytes of one weight."""
        first = block.to(tl.int64) * BLOCK
        i = first + tl.arange(0, BLOCK)
        ok = i < count
        byte = tl.load(Q + i, mask=ok, other=0).to(tl.int32)
        at = (2 * i) // BS
        level = tl.load(TABLE + tl.load(CODES + at, mask=ok, other=0).to(tl.int32))
        absmax = level * tl.load(SCALE + at // BS2, mask=ok, other=0.0) + tl.load(OFFSET)
        dtype = OUT.dtype.element_ty
        high = (tl.load(LEVELS + (byte >> 4)) * absmax).to(dtype)
        low = (tl.load(LEVELS + (byte & 15)) * absmax).to(dtype)
        e = 2 * first + tl.arange(0, 2 * BLOCK)
        row = e // K
        tl.store(OUT + row * row_stride + (e - row * K), tl.interleave(high, low), mask=e < 2 * count)
