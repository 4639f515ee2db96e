"""NF4 with double-quantised absmax (QLoRA, arXiv 2305.14314, section 3) -> rows of a dense buffer, or the product with a
few rows of input, in one launch for all weights that read the same input.

Bit-equal to bitsandbytes, whose three launches (absmax, its offset, the weights) and temporary buffers it replaces:
products and sums are rounded one by one, so fused multiply-adds are off. A product rounds the weights as dequantising
does, sums in fp32 and rounds once.

Shapes: M rows of input, O outputs, I inputs, T rows of a dense matrix below; two weights a byte, the first in the high half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import KERNEL_DTYPES, tl, triton, triton_ready
from .launch import kernel

_BLOCK = 2048  # bytes of one program
MOST_ROWS = 4  # of a product
_OUTPUTS, _LOOK, _WARPS = 4, 16, 4  # of one program of a product: outputs, blocks of weights at a time, warps


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
        block = self._sizes["BS"]
        return nf4_serves(x) and x.shape[0] <= MOST_ROWS and x.shape[1] % block == 0 and x.is_contiguous()

    def multiply(self, x: Tensor, bias: Tensor | None, below: Tensor | None) -> Tensor:
        """x (M, I) -> [x W^T + b | x B^T] (M, O + T), read from the four-bit values.

        Args:
            bias: (O,). below: B (T, I) dense, whose rows may be part of something wider; None for T = 0.
        """
        inputs, outputs = x.shape[1], sum(2 * packed.numel() // x.shape[1] for packed, _ in self._parts)
        dense = x if below is None else below
        more = 0 if below is None else below.shape[0]
        out = x.new_empty(x.shape[0], outputs + more)
        programs = sum(-(-2 * packed.numel() // inputs // _OUTPUTS) for packed, _ in self._parts) - (-more // _OUTPUTS)
        _nf4_rows[(programs,)](
            *self._arguments, x, x.view(torch.int32), dense, x if bias is None else bias, out, inputs, dense.stride(0),
            out.stride(0), more, PARTS=len(self._parts), BS=self._sizes["BS"], BS2=self._sizes["BS2"], ROWS=x.shape[0],
            BIAS=bias is not None, BO=_OUTPUTS, LOOK=_LOOK, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        return out

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
    def _absmax(CODES, SCALE, TABLE, offset, at, ok, BS2: tl.constexpr):
        """Of the blocks of weights `at`, from their own double quantisation."""
        level = tl.load(TABLE + tl.load(CODES + at, mask=ok, other=0).to(tl.int32))
        return level * tl.load(SCALE + at // BS2, mask=ok, other=0.0) + offset

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
        absmax = _absmax(CODES, SCALE, TABLE, tl.load(OFFSET), at, ok, BS2)
        dtype = OUT.dtype.element_ty
        high = (tl.load(LEVELS + (byte >> 4)) * absmax).to(dtype)
        low = (tl.load(LEVELS + (byte & 15)) * absmax).to(dtype)
        e = 2 * first + tl.arange(0, 2 * BLOCK)
        row = e // K
        tl.store(OUT + row * row_stride + (e - row * K), tl.interleave(high, low), mask=e < 2 * count)

    @kernel
    def _nf4_rows(
        Q0, CODES0, SCALE0, OFFSET0, count0, Q1, CODES1, SCALE1, OFFSET1, count1, Q2, CODES2, SCALE2, OFFSET2, count2,
        TABLE, LEVELS, X, X_PAIRS, BELOW, BIASES, Y, inputs, below_row, y_row, below,
        PARTS: tl.constexpr, BS: tl.constexpr, BS2: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
        BO: tl.constexpr, LOOK: tl.constexpr,
    ):  # fmt: skip
        """A program gives BO outputs of one part, or of the dense matrix below, for all rows."""
        block = tl.program_id(0)
        rows0 = 2 * count0 // inputs
        rows1 = 2 * count1 // inputs * (1 if PARTS > 1 else 0)
        rows2 = 2 * count2 // inputs * (1 if PARTS > 2 else 0)
        first, second, third = tl.cdiv(rows0, BO), tl.cdiv(rows1, BO), tl.cdiv(rows2, BO)
        if block < first:
            _nf4_outputs(
                Q0, CODES0, SCALE0, OFFSET0, rows0, TABLE, LEVELS, X_PAIRS, BIASES, Y, inputs, y_row, block, 0,
                BS, BS2, ROWS, BIAS, BO, LOOK,
            )  # fmt: skip
        elif block < first + second:
            _nf4_outputs(
                Q1, CODES1, SCALE1, OFFSET1, rows1, TABLE, LEVELS, X_PAIRS, BIASES, Y, inputs, y_row, block - first, rows0,
                BS, BS2, ROWS, BIAS, BO, LOOK,
            )  # fmt: skip
        elif block < first + second + third:
            _nf4_outputs(
                Q2, CODES2, SCALE2, OFFSET2, rows2, TABLE, LEVELS, X_PAIRS, BIASES, Y, inputs, y_row,
                block - first - second, rows0 + rows1, BS, BS2, ROWS, BIAS, BO, LOOK,
            )  # fmt: skip
        else:
            _dense_outputs(
                BELOW, below, X, Y, inputs, below_row, y_row, block - first - second - third, rows0 + rows1 + rows2,
                ROWS, BO, LOOK * BS,
            )  # fmt: skip

    @triton.jit
    def _pair_sums(high, low, X_PAIRS, at, ok, KIND):
        """Weights (BO, LOOK, BS / 2) of even and odd inputs, times two inputs a word, summed within a block of weights."""
        pair = tl.load(X_PAIRS + at, mask=ok, other=0)
        even = (pair & 0xFFFF).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
        odd = ((pair >> 16) & 0xFFFF).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
        return tl.sum(high * even + low * odd, 2)

    @triton.jit
    def _put_outputs(Y, BIASES, sums, o, ok, base, BIAS: tl.constexpr):
        y = tl.sum(sums, 1)
        if BIAS:
            y += tl.load(BIASES + base + o, mask=ok, other=0.0).to(tl.float32)
        tl.store(Y + base + o, y.to(Y.dtype.element_ty), mask=ok)

    @triton.jit
    def _nf4_outputs(
        Q, CODES, SCALE, OFFSET, rows, TABLE, LEVELS, X_PAIRS, BIASES, Y, inputs, y_row, block, base,
        BS: tl.constexpr, BS2: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, BO: tl.constexpr, LOOK: tl.constexpr,
    ):  # fmt: skip
        kind: tl.constexpr = Y.dtype.element_ty
        half: tl.constexpr = BS // 2
        o, g, j = block * BO + tl.arange(0, BO), tl.arange(0, LOOK), tl.arange(0, half)
        ok, blocks, words = o < rows, inputs // BS, inputs // 2
        offset = tl.load(OFFSET)
        y0, y1 = tl.zeros([BO, LOOK], tl.float32), tl.zeros([BO, LOOK], tl.float32)
        y2, y3 = tl.zeros([BO, LOOK], tl.float32), tl.zeros([BO, LOOK], tl.float32)
        for start in range(0, blocks, LOOK):
            here = (start + g) < blocks
            at = o[:, None].to(tl.int64) * blocks + (start + g)[None, :]
            inside = ok[:, None] & here[None, :]
            absmax = _absmax(CODES, SCALE, TABLE, offset, at, inside, BS2)
            byte = tl.load(Q + at[:, :, None] * half + j[None, None, :], mask=inside[:, :, None], other=0).to(tl.int32)
            high = (tl.load(LEVELS + (byte >> 4)) * absmax[:, :, None]).to(kind).to(tl.float32)
            low = (tl.load(LEVELS + (byte & 15)) * absmax[:, :, None]).to(kind).to(tl.float32)
            word = (start + g)[None, :, None] * half + j[None, None, :]
            there = here[None, :, None]
            y0 += _pair_sums(high, low, X_PAIRS, word, there, kind)
            if ROWS > 1:
                y1 += _pair_sums(high, low, X_PAIRS + words, word, there, kind)
            if ROWS > 2:
                y2 += _pair_sums(high, low, X_PAIRS + 2 * words, word, there, kind)
            if ROWS > 3:
                y3 += _pair_sums(high, low, X_PAIRS + 3 * words, word, there, kind)
        _put_outputs(Y, BIASES, y0, o, ok, base, BIAS)
        if ROWS > 1:
            _put_outputs(Y + y_row, BIASES, y1, o, ok, base, BIAS)
        if ROWS > 2:
            _put_outputs(Y + 2 * y_row, BIASES, y2, o, ok, base, BIAS)
        if ROWS > 3:
            _put_outputs(Y + 3 * y_row, BIASES, y3, o, ok, base, BIAS)

    @triton.jit
    def _dense_outputs(
        W, rows, X, Y, inputs, w_row, y_row, block, base, ROWS: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr
    ):
        o, k = block * BO + tl.arange(0, BO), tl.arange(0, BK)
        ok = o < rows
        for row in tl.static_range(ROWS):
            sums = tl.zeros([BO, BK], tl.float32)
            for start in range(0, inputs, BK):
                here = (start + k) < inputs
                x = tl.load(X + row * inputs + start + k, mask=here, other=0.0).to(tl.float32)
                w = tl.load(W + o[:, None] * w_row + (start + k)[None, :], mask=ok[:, None] & here[None, :], other=0.0)
                sums += w.to(tl.float32) * x[None, :]
            _put_outputs(Y + row * y_row, Y, sums, o, ok, base, False)
