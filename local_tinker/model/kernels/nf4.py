"""NF4 with double-quantised absmax (QLoRA, arXiv 2305.14314, section 3) -> rows of a dense buffer, or the product with a
few rows of input, in one launch for all weights that read the same input.

Bit-equal to bitsandbytes, whose three launches (absmax, its offset, the weights) and temporary buffers it replaces:
products and sums are rounded one by one, so fused multiply-adds are off. A product rounds the weights as dequantising
does, sums in fp32 and rounds once. It runs on the tensor cores even for one row: what limits it is the number of
instructions a weight costs, and they take the multiplication and the sum away.

Shapes: M rows of input, O outputs, I inputs, T rows of a dense matrix below; two weights a byte, the first in the high half.
Of one program of a product: BO outputs, S splits of the inputs that go on side by side, NR at least M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import KERNEL_DTYPES, power_of_two, tl, triton, triton_ready
from .launch import kernel

_BLOCK = 2048  # bytes of one program
MOST_ROWS = 16  # of a product
_SPLITS = 8  # of the inputs: with one row as many columns as the smallest product of the tensor cores has
_TILES = {1: (8, 4), 2: (16, 2)}  # rows -> outputs and warps of one program; the last stands for all above


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
        block, small = self._sizes["BS"], all(packed.numel() < 2**31 for packed, _ in self._parts)
        return nf4_serves(x) and x.shape[0] <= MOST_ROWS and x.shape[1] % block == 0 and x.is_contiguous() and small

    def multiply(self, x: Tensor, bias: Tensor | None, below: Tensor | None) -> Tensor:
        """x (M, I) -> [x W^T + b | x B^T] (M, O + T), read from the four-bit values.

        Args:
            bias: (O,). below: B (T, I) dense, whose rows may be part of something wider; None for T = 0.
        """
        inputs, outputs = x.shape[1], sum(2 * packed.numel() // x.shape[1] for packed, _ in self._parts)
        dense = x if below is None else below
        more = 0 if below is None else below.shape[0]
        out = x.new_empty(x.shape[0], outputs + more)
        own, warps = _TILES[min(x.shape[0], max(_TILES))]
        programs = sum(-(-2 * packed.numel() // inputs // own) for packed, _ in self._parts) - (-more // own)
        _nf4_rows[(programs,)](
            *self._arguments, x, dense, x if bias is None else bias, out, x.shape[0], inputs, dense.stride(0), out.stride(0),
            more, PARTS=len(self._parts), BS=self._sizes["BS"], BS2=self._sizes["BS2"], BIAS=bias is not None, BO=own,
            S=_SPLITS, NR=power_of_two(x.shape[0], 1), num_warps=warps, enable_fp_fusion=False,
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
        TABLE, LEVELS, X, BELOW, BIASES, Y, rows, inputs, below_row, y_row, below,
        PARTS: tl.constexpr, BS: tl.constexpr, BS2: tl.constexpr, BIAS: tl.constexpr,
        BO: tl.constexpr, S: tl.constexpr, NR: tl.constexpr,
    ):  # fmt: skip
        """A program gives BO outputs of one part, or of the dense matrix below, for all rows."""
        block = tl.program_id(0)
        size0 = 2 * count0 // inputs
        size1 = 2 * count1 // inputs * (1 if PARTS > 1 else 0)
        size2 = 2 * count2 // inputs * (1 if PARTS > 2 else 0)
        first, second, third = tl.cdiv(size0, BO), tl.cdiv(size1, BO), tl.cdiv(size2, BO)
        if block < first:
            _nf4_outputs(
                Q0, CODES0, SCALE0, OFFSET0, size0, TABLE, LEVELS, X, BIASES, Y, rows, inputs, y_row, block, 0,
                BS, BS2, BIAS, BO, S, NR,
            )  # fmt: skip
        elif block < first + second:
            _nf4_outputs(
                Q1, CODES1, SCALE1, OFFSET1, size1, TABLE, LEVELS, X, BIASES, Y, rows, inputs, y_row, block - first, size0,
                BS, BS2, BIAS, BO, S, NR,
            )  # fmt: skip
        elif block < first + second + third:
            _nf4_outputs(
                Q2, CODES2, SCALE2, OFFSET2, size2, TABLE, LEVELS, X, BIASES, Y, rows, inputs, y_row,
                block - first - second, size0 + size1, BS, BS2, BIAS, BO, S, NR,
            )  # fmt: skip
        else:
            _dense_outputs(
                BELOW, below, X, Y, rows, inputs, below_row, y_row, block - first - second - third, size0 + size1 + size2,
                BS, BO, S, NR,
            )  # fmt: skip

    @triton.jit
    def _columns(X, rows, inputs, start, at, BS: tl.constexpr, S: tl.constexpr, NR: tl.constexpr):
        """Inputs `at` (L,) of blocks start to start + S, a column a block and row (L, S * NR): the tensor cores multiply each
        split of the weights with every split of the input, of which one counts. So one row fills their eight columns."""
        n = tl.arange(0, S * NR)
        block, row = start + n // NR, n % NR
        ok = (block < inputs // BS) & (row < rows)
        return tl.load(X + row[None, :] * inputs + block[None, :] * BS + at[:, None], mask=ok[None, :], other=0.0)

    @triton.jit
    def _put_outputs(
        Y, BIASES, sums, rows, outputs, y_row, block, base,
        BIAS: tl.constexpr, BO: tl.constexpr, S: tl.constexpr, NR: tl.constexpr,
    ):  # fmt: skip
        """Add up what each split (S * BO, S * NR) gave with its own input, and store."""
        own, n = tl.arange(0, S * BO) // BO, tl.arange(0, S * NR) // NR
        sums = tl.where(own[:, None] == n[None, :], sums, 0.0)
        y = tl.sum(tl.sum(tl.reshape(sums, (S, BO, S, NR)), 2), 0)
        o, row = block * BO + tl.arange(0, BO), tl.arange(0, NR)
        if BIAS:
            y += tl.load(BIASES + base + o, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
        ok = (o < outputs)[:, None] & (row < rows)[None, :]
        tl.store(Y + row[None, :] * y_row + base + o[:, None], y.to(Y.dtype.element_ty), mask=ok)

    @triton.jit
    def _packed_blocks(
        Q, CODES, SCALE, TABLE, offset, o, ok, block, blocks, BS: tl.constexpr, BS2: tl.constexpr
    ):  # fmt: skip
        """Bytes (R, BS / 2) and absmax (R,) of one block of each output `o` (R,)."""
        half: tl.constexpr = BS // 2
        at, ok = o * blocks + block, ok & (block < blocks)
        byte = tl.load(Q + at[:, None] * half + tl.arange(0, half)[None, :], mask=ok[:, None], other=0)
        return byte, _absmax(CODES, SCALE, TABLE, offset, at, ok, BS2)

    @triton.jit
    def _levels(table, index):
        """Of a table of sixteen, through shared memory: reading it from global memory costs an address a weight."""
        return tl.reshape(tl.gather(table, tl.reshape(index, (index.numel,)), 0), index.shape)

    @triton.jit
    def _nf4_outputs(
        Q, CODES, SCALE, OFFSET, outputs, TABLE, LEVELS, X, BIASES, Y, rows, inputs, y_row, block, base,
        BS: tl.constexpr, BS2: tl.constexpr, BIAS: tl.constexpr, BO: tl.constexpr, S: tl.constexpr, NR: tl.constexpr,
    ):  # fmt: skip
        kind: tl.constexpr = Y.dtype.element_ty
        r, pair = tl.arange(0, S * BO), 2 * tl.arange(0, BS // 2)
        o, split, blocks = block * BO + r % BO, r // BO, inputs // BS
        ok, offset, table = o < outputs, tl.load(OFFSET), tl.load(LEVELS + tl.arange(0, 16))
        sums = tl.zeros([S * BO, S * NR], tl.float32)
        byte, absmax = _packed_blocks(Q, CODES, SCALE, TABLE, offset, o, ok, split, blocks, BS, BS2)
        for start in range(0, blocks, S):
            later, its_absmax = _packed_blocks(
                Q, CODES, SCALE, TABLE, offset, o, ok, start + S + split, blocks, BS, BS2
            )
            index = byte.to(tl.int32)
            high = (_levels(table, index >> 4) * absmax[:, None]).to(kind)
            low = (_levels(table, index & 15) * absmax[:, None]).to(kind)
            sums = tl.dot(high, _columns(X, rows, inputs, start, pair, BS, S, NR), sums)
            sums = tl.dot(low, _columns(X, rows, inputs, start, pair + 1, BS, S, NR), sums)
            byte, absmax = later, its_absmax
        _put_outputs(Y, BIASES, sums, rows, outputs, y_row, block, base, BIAS, BO, S, NR)

    @triton.jit
    def _dense_outputs(
        W, outputs, X, Y, rows, inputs, w_row, y_row, block, base,
        BS: tl.constexpr, BO: tl.constexpr, S: tl.constexpr, NR: tl.constexpr,
    ):  # fmt: skip
        r, k = tl.arange(0, S * BO), tl.arange(0, BS)
        o, split, blocks = block * BO + r % BO, r // BO, inputs // BS
        sums = tl.zeros([S * BO, S * NR], tl.float32)
        for start in range(0, blocks, S):
            ok = (o < outputs) & (start + split < blocks)
            at = o.to(tl.int64) * w_row + (start + split) * BS
            w = tl.load(W + at[:, None] + k[None, :], mask=ok[:, None], other=0.0)
            sums = tl.dot(w, _columns(X, rows, inputs, start, k, BS, S, NR), sums)
        _put_outputs(Y, Y, sums, rows, outputs, y_row, block, base, False, BO, S, NR)
