"""What a run works in: the cache, the rows' state and the captured steps, kept from run to run on one device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.kernels.draw import RowState, advance, draw
from ..model.kernels.paged import PagedRows
from ..out_of_memory import give_back, is_out_of_memory
from .forward import Forward
from .kv_cache import KVCache
from .pick import kept_logits
from .rows import DeviceRows, PageTables, TableShape, new_output

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows of a captured step
STEPS = {"cuda": 8, "cpu": 1}  # decoding steps between two looks of the host


def pick(logits: Tensor, state: RowState, *, filtered: bool) -> tuple[Tensor, Tensor]:
    """Logits (B, V) -> tokens (B,) and their log-probs (B,) by the rows' settings."""
    return draw(logits, state.noise, kept=kept_logits(logits, state) if filtered else None)


@dataclass(frozen=True)
class StepKind:
    """What distinguishes captured steps."""

    shape: TableShape
    filtered: bool


class Fetch:
    """Numbers on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event = None
        if tensors[0].is_cuda:
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = [t.clone() for t in tensors]

    def arrays(self) -> list[np.ndarray]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return [host.numpy() for host in self._host]


class Workspace:
    """Belongs to one run at a time."""

    def __init__(self, forward: Forward, *, shape: dict[str, Any], max_rows: int, positions: int) -> None:
        self.cache = KVCache(**shape)
        self.device = self.cache.device
        self.rows = DeviceRows(max_rows, self.device)
        self.tables = PageTables(self.device, rows=max_rows, positions=positions)
        self.max_rows = max_rows
        wide = torch.float64 if shape["dtype"] == torch.float64 else torch.float32
        self.out = new_output(STEPS[self.device.type], max_rows, self.device, wide)
        self._forward = forward
        self._graphs: dict[StepKind, Any] = {}
        self._views: dict[TableShape, tuple[RowState, PagedRows]] = {}
        self._version: Any = None
        self._pool: Any = None

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def forget_steps(self) -> None:
        """Captured steps hold addresses that are no longer true.

        They may still be running, and what they work in is unmapped once the stream that recorded them is done.
        """
        if self._graphs:
            _capture_stream(self.device).wait_stream(torch.cuda.current_stream(self.device))
        self._graphs.clear()
        self._views.clear()
        self._pool = None

    def clear(self) -> None:
        """No row is left of the last run."""
        self.rows.end(range(self.max_rows))

    def free(self) -> None:
        self.forget_steps()
        self.cache.free()

    def run_steps(self, kind: StepKind, steps: int) -> Fetch:
        """Start decoding steps for the rows of `kind`; their tokens and log-probs (steps, B) come with the result."""
        if self._version != self._forward.version:
            self.forget_steps()
            self._version = self._forward.version
        self.out.at.zero_()
        step = self._captured(kind) if self._capturable else lambda: self._step(kind)
        for _ in range(steps):
            step()
        rows = kind.shape.rows
        return Fetch(self.out.tokens[:steps, :rows], self.out.logprobs[:steps, :rows])

    @property
    def _capturable(self) -> bool:
        return self.device.type == "cuda" and self._forward.fused is not None

    def _step(self, kind: StepKind) -> None:
        if kind.shape not in self._views:
            state = self.rows.first(kind.shape.rows)
            if len(self._views) > 64:  # on a CPU shapes follow the rows' lengths
                self._views.clear()
            self._views[kind.shape] = state, self.tables.view(kind.shape, state)
        state, rows = self._views[kind.shape]
        logits = self._forward.step(state, self.cache, rows)
        advance(state, *pick(logits, state, filtered=kind.filtered), self.out)

    def _captured(self, kind: StepKind) -> Callable[[], None]:
        graph = self._graphs.get(kind)
        if graph is None:
            graph = self._graphs[kind] = self._capture_with_room(kind)
        return graph.replay

    def _capture_with_room(self, kind: StepKind) -> Any:
        """While a step is recorded the allocator cannot return what it holds unused to the device. So running out of
        memory then says little, until all of that was returned and the step is recorded again."""
        try:
            return self._capture(kind)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        give_back()
        if not self._graphs:
            self._pool = None  # a pool ends with its last graph, also with one that came to nothing
        return self._capture(kind)

    def _capture(self, kind: StepKind) -> Any:
        """Run the step once to load what it uses, then record it. The rows stand still meanwhile: they write this step's
        keys where they will be written again."""
        state = self.rows.first(kind.shape.rows)
        alive, current = state.alive.clone(), torch.cuda.current_stream(self.device)
        state.alive.zero_()
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                what = "steps", kind.filtered, kind.shape.prefixes > 0
                self._forward.compile_once(what, lambda: self._step(kind), self.device)
                self._step(kind)
                record(graph, lambda: self._step(kind), pool=self._pool)
        finally:
            # After a failure the cache is freed, and before its memory is unmapped the allocator waits for `current` alone.
            current.wait_stream(stream)
            state.alive.copy_(alive)
            self.out.at.zero_()
        return graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: on every stream cuBLAS keeps a workspace (32 MiB on an H100) and the allocator keeps the
    memory of the step that was run there."""
    return torch.cuda.Stream(device)


def record(graph: Any, step: Callable[[], None], *, pool: Any) -> None:
    """Capture what `step` launches. Begun and ended by hand: torch.cuda.graph() collects garbage and empties the
    allocator's cache each time. The error of a step that fails is the one that is raised, so that running out of memory
    is seen as that."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        step()
    except BaseException:
        with suppress(RuntimeError):  # a capture that is no longer valid says so here
            _end(graph, pool)
        raise
    _end(graph, pool)


def _end(graph: Any, pool: Any) -> None:
    """A capture that is no longer valid raises before it has told the allocator that it is over, and until the allocator
    hears so it returns no memory to the device."""
    try:
        graph.capture_end()
    except RuntimeError:
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
        raise
