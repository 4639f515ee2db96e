"""Projections of one input for a decoding step: x is read once and gives W x and the adapter's A x together.

Shapes: B rows, I inputs, O outputs of all parts, R rank padded to a power of two of 16 or more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .group import ProjectionGroup
from .kernels import KERNEL_DTYPES, power_of_two
from .kernels.low_rank import LowRank, add_low_rank, join_slices
from .linear import project
from .lora import LoraPair

FEW_ROWS = 128  # so many are multiplied as fast by the adapter's rows alone
SLICED_ROWS = 16  # so many are multiplied faster by slices of the inputs, whatever the weights' shape


def slices_for(rows: int, inputs: int, outputs: int) -> int:
    """In how many slices of the inputs a product of so many rows is faster, 0 for none.

    Few outputs are too few tiles for a card. cuBLAS then splits the inputs as well, less often than is faster, and adds the
    parts up in a kernel of its own; here the one that adds the adapter's part does. Many rows of very few outputs would
    need more slices than are worth adding up. Measured on an H100, see `products_by_slices` in
    benchmarks/results/sample_h100.json.
    """
    if inputs % 16 or (rows > SLICED_ROWS and inputs < 2 * outputs) or (rows > 192 and outputs <= 2048):
        return 0
    return 2


class Stacked:
    """One group's weights with the A matrices of one adapter below them, in the buffer that the group holds anyway.

    Few rows are multiplied from four-bit weights themselves; more of them, where there is no memory to hold the weights
    dense, from what is dequantised for each product.
    """

    def __init__(self, group: ProjectionGroup) -> None:
        self.group = group
        self._rank = 0
        self._bias: Tensor | None = None  # (O + room below)
        self._apart: Tensor | None = None  # A (parts * R, I) where the weights are not held
        self._b: Tensor | None = None  # (O, R)
        self._scale = 1.0
        self._adapted = False
        self._laid_out = -1  # where the weights stood when this was prepared
        self._below: int | None = None  # what `group.below` must say while ours stands there

    @property
    def outputs(self) -> int:
        return self.group.outputs

    @property
    def held(self) -> bool:
        return self.group.held

    @property
    def _width(self) -> int:
        """parts * R"""
        return len(self.group.linears) * self._rank

    @property
    def _a(self) -> Tensor | None:
        """(parts * R, I). Asked for each time: a view that is kept would keep weights that training has let go of."""
        if not self.held:
            return self._apart
        return self.group.with_below(self._width)[self.outputs :]

    @property
    def address(self) -> tuple[int, ...]:
        """Where the weights, the bias and the adapter stand, and how far apart rows of the weights; 0 for what is not there."""
        rest = (self._bias, *((self._a, self._b) if self._adapted else ()))
        pitch = self.group.with_below(0).stride(0) if self.held else 0
        return self._weights_at(), pitch, *(0 if t is None else t.data_ptr() for t in rest)

    @property
    def current(self) -> bool:
        """Whether nobody has written where the adapter stands, nor moved or let go of the weights."""
        if self._weights_at() != self._laid_out:
            return False
        return not self._adapted or not self.held or self.group.below == self._below

    def _weights_at(self) -> int:
        return self.group.with_below(0).data_ptr() if self.held else 0

    def prepare(self, rank: int) -> None:
        """Lay out room for an adapter of this rank (0 for none). A base that is dense anyway moves into the layout."""
        self._rank = max(self._rank, power_of_two(rank, 16) if rank else 0)
        if self.held or all(linear.storage == "dense" for linear in self.group.linears):
            self.group.hold(self._width)
        self._laid_out = self._weights_at()
        like = dict(dtype=self.group.linears[0].dtype, device=self.group.linears[0].weight.device)
        if self.held:
            self._apart = None
        elif self._apart is None or self._apart.shape[0] != self._width:
            self._apart = torch.zeros(self._width, self.group.inputs, **like)
        if self._b is None or self._b.shape[1] != self._rank:
            self._b = torch.zeros(self.outputs, self._rank, **like)
        self._pad_bias(self.group.spare_rows if self.held else self._width)

    def _pad_bias(self, room: int) -> None:
        bias = self.group.bias
        if bias is not None and (self._bias is None or self._bias.shape[0] != self.outputs + room):
            self._bias = F.pad(bias, (0, room))

    def release(self) -> None:
        self._apart = self._b = self._bias = None
        self._rank, self._adapted = 0, False

    def bind(self, pairs: Sequence[LoraPair | None], scale: float) -> list[tuple[Tensor, Tensor]]:
        """Set which parts have an adapter; returns (destination, source) copies that bring its values here."""
        self._adapted = any(pair is not None for pair in pairs)
        if not self._adapted:
            return []
        self._scale, rank = scale, self._rank
        copies = []
        for part, pair in enumerate(pairs):
            a, b = (
                self._a[part * rank : (part + 1) * rank],
                self._b[self.group.starts[part] : self.group.starts[part + 1]],
            )
            own = 0 if pair is None else pair[0].shape[0]
            if own < rank:
                a[own:].zero_()
                b[:, own:].zero_()
            if pair is not None:
                copies += [(a[:own], pair[0]), (b[:, :own], pair[1])]
        self._below = next(pair[0].data_ptr() for pair in pairs if pair is not None)
        self.group.below = self._below
        return copies

    def product(self, x: Tensor) -> tuple[Tensor, LowRank | None]:
        """x (B, I) -> W x + b in the first O columns of y, and what the adapter adds to it."""
        outputs, packed, more = self.outputs, self.group.packed, self._width if self._adapted else 0
        # Faster than reading the dense weights, even where they are held.
        if packed is not None and packed.multiplies(x):
            y = packed.multiply(x, self.group.bias, self._a if more else None)
        elif self.held:
            below = self._below_for(x) if more else 0
            bias = None if self._bias is None else self._bias[: outputs + below]
            y = project(x, self.group.with_below(below), bias)
        else:
            y = project(x, self.group.dense(), self.group.bias)
            return y, self._low_rank(project(x, self._a) if more else None)
        return y, self._low_rank(y[:, outputs : outputs + more] if more else None)

    def adapted(self, x: Tensor) -> Tensor:
        """x (B, I) -> W x + b + s B A x (B, O), of one projection whose adapter no later step takes along."""
        if slices := self._slices(x):
            products = _product_by_slices(x, self.group.with_below(self._below_for(x)), slices)
            return join_slices(products, self.outputs, self._b, self._scale, x.dtype)
        y, low = self.product(x)
        y = y[:, : self.outputs]
        return y if low is None else add_low_rank(y, low)

    def _slices(self, x: Tensor) -> int:
        """In how many slices of the inputs x is multiplied, 0 for all at once: without an adapter, whose kernel adds the
        slices up, there is nothing to be had."""
        group = self.group
        if not (
            self._adapted
            and x.is_cuda
            and x.dtype in KERNEL_DTYPES
            and self.held
            and group.single
            and group.bias is None
        ):
            return 0
        if group.packed is not None and group.packed.multiplies(x):
            return 0
        return slices_for(x.shape[0], group.inputs, group.outputs)

    def _below_for(self, x: Tensor) -> int:
        """Rows below the weights to multiply by: of one projection's all that are there, see `rows_below`, where that is
        faster. What the rows past the adapter's give is not looked at."""
        return self.group.spare_rows if self.group.single and x.shape[0] > FEW_ROWS else self._width

    def _low_rank(self, thin: Tensor | None) -> LowRank | None:
        return None if thin is None else LowRank(thin, self._b, self._scale, self.group.starts)


def _product_by_slices(x: Tensor, weight: Tensor, slices: int) -> Tensor:
    """x (B, I), weight (O, I) -> (S, B, O) fp32: the products of each slice of the inputs."""
    apart = x.view(x.shape[0], slices, -1).transpose(0, 1), weight.view(weight.shape[0], slices, -1).permute(1, 2, 0)
    if not x.is_cuda:  # for the tests: a result of another type is for cards alone, and so are slices
        return torch.bmm(*(side.float() for side in apart))
    return torch.bmm(*apart, out_dtype=torch.float32)
