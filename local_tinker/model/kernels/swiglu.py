"""The gated activation of the MLP, act(gate) * up (SwiGLU and GeGLU, arXiv 2002.05202), forward and backward.

Shapes: N packed tokens, F intermediate size; `gate_up` (N, 2F) holds gate in its first half.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import serves, tl, triton
from .launch import kernel

# activation -> (forward, gradient from (dy, x))
ACTIVATIONS = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="none")),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
}
_BLOCK = 1024


def gated_reference(gate_up: Tensor, activation: str, out: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        torch.ops.aten.silu.out(gate, out=out)
    else:
        torch.ops.aten.gelu.out(gate, approximate="tanh" if activation == "gelu_tanh" else "none", out=out)
    out.mul_(up)


def gated_backward_reference(gate_up: Tensor, dy: Tensor, activation: str) -> None:
    forward, slope = ACTIVATIONS[activation]
    gate, up = gate_up.chunk(2, dim=-1)
    acted = forward(gate)
    gate.copy_(slope(dy * up, gate))
    product = acted * up
    up.copy_(dy * acted)
    dy.copy_(product)


def gated(gate_up: Tensor, activation: str, *, spent: bool = False) -> Tensor:
    """(N, 2F) -> act(gate) * up (N, F), act(gate) rounded to the compute type first.

    Args:
        spent: nobody reads gate_up after this; its first half may become the result.
    """
    n, width = gate_up.shape
    out = gate_up[:, : width // 2] if spent and not serves(gate_up) else gate_up.new_empty(n, width // 2)
    if not serves(gate_up):
        gated_reference(gate_up, activation, out)
    elif n:
        grid = (n, -(-width // 2 // _BLOCK))
        _gated[grid](gate_up, out, width // 2, gate_up.stride(0), KIND=_kind(activation), BLOCK=_BLOCK, num_warps=4)
    return out


def gated_backward_(gate_up: Tensor, dy: Tensor, activation: str) -> None:
    """In place: gate_up becomes its own gradient, and dy (N, F) becomes act(gate) * up, which the caller did not keep."""
    n, f = dy.shape
    if not serves(gate_up):
        gated_backward_reference(gate_up, dy, activation)
    elif n:
        grid = (n, -(-f // _BLOCK))
        _gated_backward[grid](
            gate_up, dy, f, gate_up.stride(0), dy.stride(0), KIND=_kind(activation), BLOCK=_BLOCK, num_warps=4
        )


def _kind(activation: str) -> int:
    return list(ACTIVATIONS).index(activation)


if triton is not None:

    @triton.jit
    def _act(g, KIND: tl.constexpr):
        """fp32 g -> act(g), act'(g)."""
        if KIND == 0:
            s = tl.sigmoid(g)
            return g * s, s * (1.0 + g * (1.0 - s))
        elif KIND == 1:
            phi = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
            return g * phi, phi + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
        else:
            inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
            t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
            slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
            return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope

    @kernel
    def _gated(X, OUT, F, x_row, KIND: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m = c < F
        g = tl.load(X + row * x_row + c, mask=m, other=0.0)
        u = tl.load(X + row * x_row + F + c, mask=m, other=0.0)
        a, _ = _act(g.to(tl.float32), KIND)
        tl.store(OUT + row * F + c, a.to(g.dtype).to(tl.float32) * u.to(tl.float32), mask=m)

    @kernel
    def _gated_backward(X, DY, F, x_row, dy_row, KIND: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m = c < F
        g = tl.load(X + row * x_row + c, mask=m, other=0.0)
        u = tl.load(X + row * x_row + F + c, mask=m, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_row + c, mask=m, other=0.0).to(tl.float32)
        a, slope = _act(g.to(tl.float32), KIND)
        a = a.to(g.dtype).to(tl.float32)
        tl.store(X + row * x_row + c, (dy * u).to(g.dtype).to(tl.float32) * slope, mask=m)
        tl.store(X + row * x_row + F + c, dy * a, mask=m)
        tl.store(DY + row * dy_row + c, a * u, mask=m)
