"""Fused kernels in Triton, each beside the torch code that defines what it computes.

A file holds the definition (`*_reference`), the kernel, and one function that picks: the kernel where `serves` says so,
the definition anywhere else. Rounding points are the definition's, so that the choice changes speed and memory only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no package for this platform, or not installed: definitions alone
    triton = tl = None


if triton is not None:

    class Jit(triton.JITFunction):
        """A Triton function whose launches only compile it while `compile_first` gathers them."""

        def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            gathered = gathering()
            if gathered is None:
                return _compiled(super().run(*args, grid=grid, warmup=warmup, **options))
            gathered.append(super().run(*args, grid=grid, warmup=True, **options))
            return None


_gathered: ContextVar[list[Any] | None] = ContextVar("gathered", default=None)


def gathering() -> list[Any] | None:
    """Where launches go while `compile_first` gathers them."""
    return _gathered.get()


def _compiled(kernel: Any) -> Any:
    """The kernel itself; Triton's cache has a promise of it where a compilation side by side was interrupted."""
    return getattr(kernel, "result", lambda: kernel)()


def jit(function: Callable) -> Callable:
    """triton.jit; without Triton the source stays as it is, and `triton_ready` keeps it from being called."""
    return function if triton is None else jit_as(Jit, function)


def jit_as(kind: type, function: Callable, **options: Any) -> Any:
    """triton.jit with a class of ours; the interpreter, which compiles nothing, gets Triton's own."""
    if triton.knobs.runtime.interpret:
        return triton.jit(function, **options)
    return kind(function, **options)


def compile_first(step: Callable[[], Any], device: torch.device) -> None:
    """Run `step` without its Triton kernels, which are compiled meanwhile, side by side; on cards only.

    Compiled at its first launch, a kernel takes half a second, most of it in a C compiler and an assembler, and a decoding
    step has a dozen of them. What `step` computes without them is worth nothing, so it must keep nothing of it, and change
    nothing that it does not make again when it runs; where no kernel serves, for float64, it computes in full.
    """
    if device.type != "cuda" or interpreted() or not triton_ready("cuda") or not hasattr(triton, "AsyncCompileMode"):
        return
    gathered: list[Any] = []
    current = torch.cuda.current_device()

    def load(kernel: Any) -> None:
        torch.cuda.set_device(current)  # a thread begins without
        _ = kernel.run  # builds and loads what launches it

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        before = _gathered.set(gathered)
        try:
            with triton.AsyncCompileMode(pool):
                step()
        finally:
            _gathered.reset(before)
        made = {id(kernel): kernel for kernel in map(_compiled, gathered)}
        for loaded in [pool.submit(load, kernel) for kernel in made.values()]:
            loaded.result()


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is n or more."""
    return max(least, 1 << max(0, n - 1).bit_length())


KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def fault(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device, in words for the user; None where they can.

    On a CPU they run through Triton's interpreter alone, which tests switch on by TRITON_INTERPRET=1.
    """
    if device_type != "cuda" and not interpreted():
        return "kernels are for NVIDIA cards"
    if triton is None:
        return "the package triton did not import"
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "the card is older than compute capability 8.0"
    return None


def triton_ready(device_type: str) -> bool:
    return fault(device_type) is None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: half precision, on a card (or the interpreter)."""
    return all(t.dtype in KERNEL_DTYPES for t in tensors) and triton_ready(tensors[0].device.type)
