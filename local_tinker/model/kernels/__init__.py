"""Fused kernels in Triton, each beside the torch code that defines what it computes.

A file holds the definition (`*_reference`), the kernel, and one function that picks: the kernel where `serves` says so,
the definition anywhere else. Rounding points are the definition's, so that the choice changes speed and memory only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no package for this platform, or not installed: definitions alone
    triton = tl = None


def jit(function: Callable) -> Callable:
    """triton.jit; without Triton the source stays as it is, and `triton_ready` keeps it from being called."""
    return function if triton is None else triton.jit(function)


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
