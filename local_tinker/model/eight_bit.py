"""A projection group whose base products are of 8-bit floats, an approximation that is asked for by name.

The adapter's products stay in the compute type: three bits of mantissa would round small updates away, as merging them
into the base would. Activations and gradients are rounded as they come, the weights once where they are held.

Shapes: N packed tokens, I inputs, O outputs of all members.
"""

from __future__ import annotations

from torch import Tensor

from .group import ProjectionGroup
from .kernels.fp8 import Rows, product, quantise_rows


class EightBitGroup(ProjectionGroup):
    """While `hold()` is in force the weights are there twice in e4m3, which takes the room of one dense copy: by outputs
    for the forward product and by inputs for the backward one, for the tensor cores read both sides along the sum."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._outputs: Rows | None = None  # (O, I)
        self._inputs: Rows | None = None  # (I, O)

    @property
    def held(self) -> bool:
        return self._outputs is not None

    @property
    def rebuilt(self) -> bool:
        return not self.held

    @property
    def held_bytes(self) -> int:
        return 2 * self.inputs * self.outputs if self.held else 0

    @property
    def fusable(self) -> bool:
        return False

    def hold(self, width: int = 0) -> None:  # noqa: ARG002  (adapters stand apart)
        if self._outputs is None:
            dense = self.dense()
            outputs, turned = quantise_rows(dense), dense.t().contiguous()
            del dense
            self._outputs, self._inputs = outputs, quantise_rows(turned)

    def release(self) -> None:
        self._outputs = self._inputs = None  # and nothing dense: that is the other road's, which shares the linears

    def dense(self) -> Tensor:
        if self.packed is None:
            return super().dense()
        return self._dequantised(0)  # in one launch for a single member too

    def _base(self, x: Tensor, out: Tensor | None) -> Tensor:
        weights = self._outputs or quantise_rows(self.dense())
        y = product(quantise_rows(x), weights, self.bias, x.dtype)
        return y if out is None else out.copy_(y)

    def _base_backward(self, dy: Tensor) -> Tensor:
        weights = self._inputs or quantise_rows(self.dense().t().contiguous())
        return product(quantise_rows(dy), weights, None, dy.dtype)
