"""AdamW over one flat buffer, and the window of gradients it consumes.

Shapes: P parameters of an adapter (or of a value head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..types import AdamParams

SUMS = "none"  # the normaliser of losses that are plain sums


@dataclass(eq=False)
class GradientWindow:
    """Gradients of sums since the last optimiser step, one buffer a normaliser.

    Every call adds its gradient of a *sum* and its weight; dividing once, by the window's total weight, makes k calls
    equal one big batch. Losses with different normalisers are separate terms that add.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    buffers: dict[str, Tensor] = field(default_factory=dict)  # normaliser -> (P,)
    weights: dict[str, Tensor | float] = field(default_factory=dict)
    calls: int = 0

    def buffer(self, normaliser: str) -> Tensor:
        if normaliser not in self.buffers:
            self.buffers[normaliser] = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        return self.buffers[normaliser]

    def add_weight(self, normaliser: str, weight: Tensor | float) -> None:
        """Add a call's weight; sums keep divisor 1 however many calls add to them."""
        self.weights[normaliser] = 1.0 if normaliser == SUMS else self.weights.get(normaliser, 0.0) + weight

    @property
    def empty(self) -> bool:
        return self.calls == 0

    def backup(self) -> WindowBackup:
        """What `restore` needs: nothing for an empty window, a host copy of the gradients otherwise."""
        kept = {name: buffer.to("cpu", copy=True) for name, buffer in self.buffers.items()} if not self.empty else {}
        return WindowBackup(kept, dict(self.weights), self.calls)

    def restore(self, backup: WindowBackup) -> None:
        for name, buffer in self.buffers.items():
            if name in backup.buffers:
                buffer.copy_(backup.buffers[name])
            else:
                buffer.zero_()
        self.weights, self.calls = dict(backup.weights), backup.calls

    def clear(self) -> None:
        for buffer in self.buffers.values():
            buffer.zero_()
        self.weights, self.calls = {}, 0

    def gradient(self) -> Tensor:
        """sum over normalisers of buffer / weight, (P,); a fresh tensor when there are several, else the buffer itself."""
        terms = [(self.buffers[name], weight) for name, weight in self.weights.items()]
        total: Tensor | None = None
        for buffer, weight in terms:
            term = buffer / weight if torch.is_tensor(weight) or weight != 1.0 else buffer
            total = term if total is None else total + term
        assert total is not None, "gradient() of an empty window"
        return total


@dataclass(frozen=True)
class WindowBackup:
    buffers: dict[str, Tensor]
    weights: dict[str, Tensor | float]
    calls: int


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) with one fused call for the whole buffer.

    The learning rate and every other setting come with each step, so a schedule never touches the moments. A gradient
    that is not finite changes nothing; that is decided on the device.
    """

    def __init__(self, master: Tensor) -> None:
        self.master = master
        self.m = torch.zeros_like(master)
        self.v = torch.zeros_like(master)
        self.count = torch.zeros((), dtype=torch.float32, device=master.device)  # steps applied, for bias correction

    @torch.no_grad()
    def step(self, gradient: Tensor, params: AdamParams, *, bad: Tensor) -> None:
        """One AdamW step with an already clipped gradient, which is used up.

        Args:
            bad: 1.0 where the gradient is not finite and nothing may change, else 0.0; on the device.
        """
        count = self.count + 1
        torch._fused_adamw_(
            [self.master],
            [gradient],
            [self.m],
            [self.v],
            [],
            [count],
            lr=float(params.learning_rate),
            beta1=params.beta1,
            beta2=params.beta2,
            weight_decay=params.weight_decay,
            eps=params.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=bad,
        )
        self.count.copy_(count - bad)


def clip(gradients: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """Scale gradients together to a global norm of at most `max_norm` (0 turns it off), as clip_grad_norm_ does.

    Returns:
        the gradients, their norm before clipping, and 1.0 where that is not finite else 0.0; all on the device.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    bad = (~torch.isfinite(norm)).to(torch.float32)
    if max_norm > 0:
        # torch.nn.utils.clip_grad_norm_'s coefficient: max_norm / (norm + 1e-6), at most 1
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = [g * factor for g in gradients]
    return list(gradients), norm, bad
