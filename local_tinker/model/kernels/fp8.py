"""Products of 8-bit floats (e4m3: Micikevicius et al., arXiv 2209.05433) with one scale a row of either side.

A row is divided by its largest magnitude over 448, e4m3's largest number, and rounded; the product is multiplied by both
scales. Three bits of mantissa leave an error of 2 to 4 % of a product of random matrices. On a CPU the sum is fp32; the
tensor cores keep fewer bits of it, which for the longest sums adds about half a percent.

Shapes: N rows, K columns, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import KERNEL_DTYPES, tl, triton, triton_ready
from .launch import kernel

E4M3 = torch.float8_e4m3fn
ALIGN = 16  # columns, and outputs, come in these for the tensor cores
_INVERSE = 1 / 448  # a card divides by a number by multiplying with this
_BLOCK = 4096


class Rows(NamedTuple):
    """values (N, K) in e4m3, scales (N, 1) in fp32; what they stand for is their product."""

    values: Tensor
    scales: Tensor


def quantise_rows_reference(x: Tensor) -> Rows:
    largest = x.abs().amax(1, keepdim=True).float()
    scales = torch.where(largest == 0, 1.0, largest * _INVERSE)
    return Rows((x.float() / scales).to(E4M3), scales)


def quantise_rows(x: Tensor) -> Rows:
    """x (N, K), whose rows may be part of something wider."""
    if x.dtype not in KERNEL_DTYPES or not triton_ready(x.device.type):
        return quantise_rows_reference(x)
    count, columns = x.shape
    values = torch.empty(count, columns, dtype=E4M3, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    _quantise_rows[(count,)](x, values, scales, columns, x.stride(0), INVERSE=_INVERSE, BLOCK=_BLOCK, num_warps=8)
    return Rows(values, scales)


def product_reference(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = (x.values.float() @ w.values.float().t()) * x.scales * w.scales.t()
    return (y if bias is None else y + bias.float()).to(dtype)


def product(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (N, K), w (O, K) -> x W^T + b (N, O)."""
    if not x.values.is_cuda:
        return product_reference(x, w, bias, dtype)
    y = torch._scaled_mm(x.values, w.values.t(), x.scales, w.scales.t(), out_dtype=dtype, use_fast_accum=True)
    # Apart, and so with a rounding more than the definition: cuBLAS has no product with a bias for some sizes.
    return y if bias is None else y.add_(bias)


if triton is not None:

    @kernel
    def _quantise_rows(X, OUT, SCALES, columns, x_row, INVERSE: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        largest = 0.0
        for start in range(0, columns, BLOCK):
            x = tl.load(X + row * x_row + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
        scale = tl.where(largest == 0.0, 1.0, largest * INVERSE)
        tl.store(SCALES + row, scale)
        for start in range(0, columns, BLOCK):
            ok = start + at < columns
            x = tl.load(X + row * x_row + start + at, mask=ok, other=0.0).to(tl.float32)
            tl.store(
                OUT + row * columns + start + at,
                tl.div_rn(x, scale).to(OUT.dtype.element_ty, fp_downcast_rounding="rtne"),
                mask=ok,
            )
