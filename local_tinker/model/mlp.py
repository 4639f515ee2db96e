"""The gated activation of the MLP: act(gate) * up (SwiGLU and GeGLU, arXiv 2002.05202).

Shapes: N packed tokens, F intermediate size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _gelu_slope(tanh: bool):
    approximate = "tanh" if tanh else "none"
    return lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


# activation -> (forward, gradient from (dy, x))
ACTIVATIONS = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, _gelu_slope(tanh=False)),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_slope(tanh=True)),
}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up (N, F) -> act(gate) * up (N, F), act(gate) rounded to the compute type first."""
    return _Gated.apply(gate, up, activation)


class _Gated(torch.autograd.Function):
    """Keeps gate and up only; act(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate) * up

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        forward, slope = ACTIVATIONS[ctx.activation]
        return slope(dy * up, gate), dy * forward(gate), None
