"""NF4 with double-quantised absmax (QLoRA, arXiv 2305.14314, section 3) -> rows of a dense buffer, in one launch.

Bit-equal to bitsandbytes, whose three launches (absmax, its offset, the weights) and temporary buffers it replaces:
products and sums are rounded one by one, so fused multiply-adds are off.

Shapes: O outputs, I inputs; two weights a byte, the first in the high half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import KERNEL_DTYPES, tl, triton, triton_ready

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


def nf4_dense(packed: Tensor, state: Any, out: Tensor) -> None:
    """Dequantise into `out` (O, I), whose rows may be part of something wider.

    Args:
        packed: bitsandbytes' packed weights. state: its QuantState, with nested statistics.
    """
    if not nf4_serves(out):
        return nf4_dense_reference(packed, state, out)
    nested, count = state.state2, packed.numel()
    _nf4_dense[(triton.cdiv(count, _BLOCK),)](
        packed, state.absmax, nested.code, nested.absmax, state.offset, state.code, out, count, out.stride(0),
        K=out.shape[1], BS=state.blocksize, BS2=nested.blocksize, BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _nf4_dense(
        Q, CODES, CODE2, SCALE2, OFFSET, LEVELS, OUT, count, row_stride,
        K: tl.constexpr, BS: tl.constexpr, BS2: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        first = tl.program_id(0).to(tl.int64) * BLOCK
        i = first + tl.arange(0, BLOCK)
        ok = i < count
        byte = tl.load(Q + i, mask=ok, other=0).to(tl.int32)
        block = (2 * i) // BS
        absmax = tl.load(CODE2 + tl.load(CODES + block, mask=ok, other=0).to(tl.int32)) * tl.load(
            SCALE2 + block // BS2, mask=ok, other=0.0
        )
        absmax = absmax + tl.load(OFFSET)
        dtype = OUT.dtype.element_ty
        high = (tl.load(LEVELS + (byte >> 4)) * absmax).to(dtype)
        low = (tl.load(LEVELS + (byte & 15)) * absmax).to(dtype)
        e = 2 * first + tl.arange(0, 2 * BLOCK)
        row = e // K
        tl.store(OUT + row * row_stride + (e - row * K), tl.interleave(high, low), mask=e < 2 * count)
