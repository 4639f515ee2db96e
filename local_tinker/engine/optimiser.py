"""AdamW over one flat buffer, and the window of gradients it consumes.

Shapes: P parameters of an adapter (or of a value head).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ..types import AdamParams
from .footprint import MOMENT_SLICE

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
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)  # pinned host copies, used again by each backup

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
        """What `restore` needs: nothing for an empty window, a host copy of the gradients otherwise.

        On a card the copy runs beside the call's forward pass; `WindowBackup.wait` holds the stream until it is done and
        comes before the first write to the buffers.
        """
        if self.empty:
            return WindowBackup({}, dict(self.weights), self.calls, None)
        if self.device.type != "cuda":
            return WindowBackup({n: b.clone() for n, b in self.buffers.items()}, dict(self.weights), self.calls, None)
        for name, buffer in self.buffers.items():
            if name not in self._kept:
                self._kept[name] = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
        side = _side_streams(self.device)[0]
        side.wait_stream(torch.cuda.current_stream(self.device))  # for the gradients, and for an earlier restore
        with torch.cuda.stream(side):
            for name, buffer in self.buffers.items():
                self._kept[name].copy_(buffer, non_blocking=True)
            done = side.record_event()
        return WindowBackup({name: self._kept[name] for name in self.buffers}, dict(self.weights), self.calls, done)

    def restore(self, backup: WindowBackup) -> None:
        """Bring back what was there at the backup. Allocates nothing."""
        backup.wait()
        for name, buffer in self.buffers.items():
            if name in backup.buffers:
                buffer.copy_(backup.buffers[name], non_blocking=True)
            else:
                buffer.zero_()
        self.weights, self.calls = dict(backup.weights), backup.calls

    def clear(self) -> None:
        for buffer in self.buffers.values():
            buffer.zero_()
        self.weights, self.calls = {}, 0

    def gradient(self, part: slice = slice(None), *, out: Tensor | None = None) -> Tensor:
        """sum over normalisers of buffer / weight, (P,) or a part of it; written to `out` where that is given, so that
        nothing is allocated."""
        assert self.weights, "gradient() of an empty window"
        first, *rest = self.weights
        out = torch.div(self.buffers[first][part], self.weights[first], out=out)
        for name in rest:
            buffer, weight = self.buffers[name][part], self.weights[name]
            if torch.is_tensor(weight):
                out.addcdiv_(buffer, weight)
            else:
                out.add_(buffer, alpha=1.0 / weight)
        return out

    def norm(self) -> Tensor:
        """Of the gradient."""
        if len(self.weights) > 1:
            return torch.linalg.vector_norm(self.gradient())
        ((name, weight),) = self.weights.items()
        return torch.linalg.vector_norm(self.buffers[name]) / weight


@dataclass(frozen=True)
class WindowBackup:
    buffers: dict[str, Tensor]
    weights: dict[str, Tensor | float]
    calls: int
    done: torch.cuda.Event | None

    def wait(self) -> None:
        """Let the current stream go on only when the copy is whole. The host waits for nothing."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), one fused call for each slice of the buffer.

    The learning rate and every other setting come with each step, so a schedule never touches the moments. A gradient
    that is not finite changes nothing; that is decided on the device.

    Moments live beside the masters or, parked, in pinned host memory. Parked ones pass through the device a slice at a
    time, on two streams so that one slice comes while another goes, and have the same bits.
    """

    def __init__(self, master: Tensor, *, parked: bool = False) -> None:
        self.master = master
        self.count = torch.zeros((), dtype=torch.float32, device=master.device)  # steps applied, for bias correction
        self.parked = parked
        self._m, self._v = self._home(None, parked), self._home(None, parked)
        self._written: torch.cuda.Event | None = None  # parked moments are on the host again

    @property
    def m(self) -> Tensor:
        """The first moment (P,), whole: waits for a step that is still writing it to the host."""
        self._settle()
        return self._m

    @property
    def v(self) -> Tensor:
        """The second moment (P,)."""
        self._settle()
        return self._v

    def park(self, parked: bool) -> None:
        """Move the moments to the host or back."""
        if parked != self.parked:
            self._settle()
            # without room for both everything stays where it was
            self._m, self._v = self._home(self._m, parked), self._home(self._v, parked)
            self.parked = parked

    def _home(self, moment: Tensor | None, parked: bool) -> Tensor:
        device = torch.device("cpu") if parked else self.master.device
        pinned = parked and self.master.is_cuda
        home = torch.empty(self.master.shape, dtype=self.master.dtype, device=device, pin_memory=pinned)
        return home.zero_() if moment is None else home.copy_(moment)

    def _settle(self) -> None:
        if self._written is not None:
            self._written.synchronize()
            self._written = None

    @torch.no_grad()
    def prepare(
        self, window: GradientWindow, params: AdamParams, *, factor: Tensor | None, bad: Tensor
    ) -> Callable[[], Tensor]:
        """An AdamW step with the window's gradient times `factor`: everything is allocated here; the function returned
        applies it, allocating nothing, and gives the new count.

        Args:
            factor: of clipping, on the device; None for none.
            bad: 1.0 where the gradient is not finite and nothing may change, else 0.0; on the device.
        """
        count = self.count + 1
        after = count - bad
        lanes = self._lanes()

        @torch.no_grad()
        def apply() -> Tensor:
            for i, start in enumerate(range(0, self.master.numel(), MOMENT_SLICE)):
                part, lane = slice(start, start + MOMENT_SLICE), lanes[i % len(lanes)]
                with lane.running():
                    m, v = lane.bring(self._m[part], self._v[part])
                    gradient = window.gradient(part, out=lane.gradient[: m.numel()])
                    if factor is not None:
                        gradient.mul_(factor)
                    _adamw(self.master[part], gradient, m, v, count, params, bad)
                    lane.take_back(m, v, self._m[part], self._v[part])
            self._written = _join(lanes)
            self.count.copy_(after)
            return after

        return apply

    def _lanes(self) -> list[_Lane]:
        size, make = min(MOMENT_SLICE, self.master.numel()), self.master.new_empty
        if not self.parked:
            return [_Lane(make(size), None, None)]
        streams = _side_streams(self.master.device) if self.master.is_cuda else (None,)
        lanes = [_Lane(make(size), make(2, size), stream) for stream in streams]
        for stream in streams:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(self.master.device))
        return lanes


@dataclass(frozen=True, eq=False)
class _Lane:
    """Where a slice is worked on: room for its gradient and, for parked moments, room for them and a stream."""

    gradient: Tensor
    stage: Tensor | None
    stream: torch.cuda.Stream | None

    def running(self) -> AbstractContextManager:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def bring(self, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.stage is None:
            return m, v
        here = self.stage[:, : m.numel()]
        return here[0].copy_(m, non_blocking=True), here[1].copy_(v, non_blocking=True)

    def take_back(self, m: Tensor, v: Tensor, home_m: Tensor, home_v: Tensor) -> None:
        if self.stage is not None:
            home_m.copy_(m, non_blocking=True)
            home_v.copy_(v, non_blocking=True)


def _join(lanes: Sequence[_Lane]) -> torch.cuda.Event | None:
    """Let the current stream wait for the lanes' own, and say when they are done."""
    streams = [lane.stream for lane in lanes if lane.stream is not None]
    if not streams:
        return None
    current = torch.cuda.current_stream(lanes[0].gradient.device)
    for stream in streams:
        current.wait_stream(stream)
    return current.record_event()


def _adamw(
    master: Tensor, gradient: Tensor, m: Tensor, v: Tensor, count: Tensor, params: AdamParams, bad: Tensor
) -> None:
    torch._fused_adamw_(
        [master],
        [gradient],
        [m],
        [v],
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


@cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two streams for copies to and from the host."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def clip(norms: Sequence[Tensor], max_norm: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """What gradients with these norms are multiplied by for a common norm of at most `max_norm` (0 turns it off), as
    clip_grad_norm_ does.

    Returns:
        the factor or None, the common norm, and 1.0 where that is not finite else 0.0; all on the device.
    """
    norm = torch.linalg.vector_norm(torch.stack(list(norms)))
    bad = (~torch.isfinite(norm)).to(torch.float32)
    # torch.nn.utils.clip_grad_norm_'s coefficient: max_norm / (norm + 1e-6), at most 1
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else None
    return factor, norm, bad
