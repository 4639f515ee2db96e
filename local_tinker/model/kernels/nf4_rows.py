"""The product of a few rows with NF4 weights, read from the four bits (see nf4_rows.cu): up to three weights of the same
inputs and a dense matrix below them in one launch, which nothing dense is written for.

Rounding points: weights are rounded as dequantising rounds them, sums are fp32 and rounded once, with the bias in them.

Shapes: M rows of input, O outputs of all weights, I inputs, T rows of the dense matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import KERNEL_DTYPES
from .cuda import CudaKernel, cuda_fault
from .dependent import launches_early

MOST_ROWS = 16
BLOCK = 64  # weights an absmax, and
NESTED = 256  # absmaxes a scale: the kernel's, and bitsandbytes' where nobody says otherwise
ROWS = (4, 8, MOST_ROWS)  # instances
# With more, programs are fewer than there are places, and sent out early they crowd where places are free first: at 16
# rows 5 % fewer tokens came than in a run before.
EARLY_ROWS = 4
THREADS, WARPS = 256, 8  # of a program
RESIDENT = 3  # programs on a multiprocessor that registers are kept for
_KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}


def nf4_rows_reference(x: Tensor, weights: Tensor, bias: Tensor | None, below: Tensor | None) -> Tensor:
    """The same in fp64, with the dequantised weights (O, I), which the kernel has only in registers."""
    y = x.double() @ weights.double().t()
    y = y if bias is None else y + bias.double()
    return y if below is None else torch.cat([y, x.double() @ below.double().t()], 1)


def rows_serve(x: Tensor, parts: Sequence[tuple[Tensor, Any]]) -> bool:
    """Whether the kernel takes these rows and weights."""
    return (
        x.is_cuda
        and x.dtype in KERNEL_DTYPES
        and 0 < x.shape[0] <= MOST_ROWS
        and x.shape[1] % BLOCK == 0
        and x.is_contiguous()
        and all(q.numel() < 2**30 and s.blocksize == BLOCK and s.state2.blocksize == NESTED for q, s in parts)
        and rows_fault(x.device.index) is None
    )


@cache
def rows_fault(device: int) -> str | None:
    """Why the kernel cannot run on this card, in words for the user; None where it can."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the card is older than compute capability 8.0"
    if (reason := cuda_fault()) is not None:
        return reason
    try:
        _kernel(device, _KINDS[torch.bfloat16], ROWS[0])
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def nf4_rows(x: Tensor, parts: Sequence[tuple[Tensor, Any]], bias: Tensor | None, below: Tensor | None) -> Tensor:
    """x (M, I) -> [x W^T + b | x B^T] (M, O + T).

    Args:
        parts: packed weights and QuantState of each. bias: (O,).
        below: B (T, I) dense, whose rows may be part of something wider but start at 16 bytes; None for T = 0.
    """
    rows, inputs = x.shape
    outputs = [2 * q.numel() // inputs for q, _ in parts]
    more = 0 if below is None else below.shape[0]
    y = x.new_empty(rows, sum(outputs) + more)
    instance = next(size for size in ROWS if rows <= size)
    kind = _KINDS[x.dtype]
    programs, splits = _shape(x.device.index, kind, instance, inputs, (*outputs, more))
    weights = []
    for at in range(3):
        q, s = parts[at] if at < len(parts) else (None, None)
        weights += [None] * 4 + [0] if q is None else [q, s.absmax, s.state2.absmax, s.offset, outputs[at]]
    state = parts[0][1]  # both tables of levels belong to the format, not to the weight
    # Weights and tables are read before the kernel ahead has ended, which is safe in a recorded step: whatever wrote them
    # ended before the step began.
    early = rows <= EARLY_ROWS and launches_early(x.device.type) and torch.cuda.is_current_stream_capturing()
    _kernel(x.device.index, kind, instance).launch(
        programs, *weights, state.state2.code, state.code, x, below, bias, y,
        rows, inputs, more, 0 if below is None else below.stride(0), y.stride(0),
        0 if bias is None else bias.shape[0], splits, dependent=early,
    )  # fmt: skip
    return y


@cache
def _kernel(device: int, kind: str, rows: int) -> CudaKernel:
    return CudaKernel("nf4_rows", device, THREADS, **constants(kind, rows))


def constants(kind: str, rows: int) -> dict[str, int | str]:
    """Of an instance, see the source."""
    outputs, step = _tile(rows)
    return dict(KIND=kind, ROWS=rows, THREADS=THREADS, RESIDENT=RESIDENT, OUTPUTS=outputs, STEP=step)


def _tile(rows: int) -> tuple[int, int]:
    """Outputs of a warp, and inputs that it takes at once."""
    return (8, 256) if rows <= 4 else (16, 128)


@cache
def _shape(device: int, kind: str, instance: int, inputs: int, outputs: tuple[int, ...]) -> tuple[int, int]:
    """Programs, no more than run at once, and warps that share the sum of a tile: many for few tiles, so that all
    multiprocessors have some."""
    size, step = _tile(instance)
    tiles, steps = sum(-(-o // size) for o in outputs), -(-inputs // step)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = processors * _kernel(device, kind, instance).resident

    def cost(splits: int) -> int:
        rounds = -(-tiles * splits // (WARPS * most))
        return rounds * (-(-steps // splits) + 2)

    splits = min((1, 2, 4, WARPS), key=cost)
    return min(most, -(-tiles * splits // WARPS)), splits
