"""Programmatic dependent launch: a kernel takes its place on the card while the one before it still runs.

A decoding step is a few hundred kernels of some microseconds, and from the end of one to the first instruction of the
next a card of compute capability 9.0 or newer takes about one more. A dependent kernel is sent out as soon as every
program of the kernel before it has begun, and waits there for what that one writes (CUDA C++ Programming Guide,
"Programmatic Dependent Launch and Synchronization").

What such a kernel keeps to: all its programs call `follow`, and none reads or writes what a kernel before it may have to
do with until then. So a kernel that has ended still means that all before it have. It sends the next one out once it has
waited itself: sooner, kernels pile up, and where they take their places the multiprocessors are not equally free.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from . import jit, tl
from .cuda import driver_version

if tl is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def launches_early(device_type: str) -> bool:
    """Whether the card can, and its driver within a recorded step (12.3): others launch one kernel after the other."""
    if device_type != "cuda" or torch.cuda.get_device_capability() < (9, 0):
        return False
    return driver_version() >= 12030


def dependent(device_type: str) -> dict[str, Any]:
    """What a launch of a Triton kernel that calls `follow(DEPENDENT)` is given."""
    return {"DEPENDENT": True, "launch_pdl": True} if launches_early(device_type) else {"DEPENDENT": False}


@jit
def follow(DEPENDENT: tl.constexpr):
    """Wait for the kernel before, then let the next one be sent out."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
