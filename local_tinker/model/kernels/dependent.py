"""Programmatic dependent launch: a kernel takes its place on the card while the one before it still runs.

A decoding step is a few hundred kernels of some microseconds, and from the end of one to the first instruction of the
next a card takes about one more. From compute capability 9.0 on a kernel may be sent out as soon as every program of the
one before it has said so or ended, and waits in its place until that one has ended and what it wrote can be read (CUDA C++
Programming Guide, "Programmatic Dependent Launch and Synchronization").

Every program here waits before it lets the next kernel be sent out. So a kernel that has ended means that all before it
have, and no more than two are ever under way. Letting the next one go sooner was slower: kernels pile up, and those that
want all multiprocessors find them taken. Nothing is written before the wait, and nothing is read that the kernel before
may write: weights, an adapter, rows' lengths and lists of pages, which is what their first memory access would wait for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from . import interpreted, jit, tl
from .cuda import driver_version

if tl is not None:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def launches_early(device_type: str) -> bool:
    """Whether the card can, and its driver within a recorded step (12.3): others launch one kernel after the other, and
    so does Triton's interpreter."""
    if device_type != "cuda" or interpreted() or torch.cuda.get_device_capability() < (9, 0):
        return False
    return driver_version() >= 12030


def dependent(device_type: str) -> dict[str, Any]:
    """What a launch of a Triton kernel that calls `follow(DEPENDENT)` is given."""
    return {"DEPENDENT": True, "launch_pdl": True} if launches_early(device_type) else {"DEPENDENT": False}


@jit
def follow(DEPENDENT: tl.constexpr):
    """Wait for the kernel before, then let the next one be sent out.

    What stands above the call may read what no kernel of a step writes, and rows' lengths, which the last one writes; but
    that one may be the kernel before the step's first, so the first reads nothing of rows there."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
