"""Running out of memory: recognise it, give back what the failed attempt held, try again smaller."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import DeviceMemoryError

T = TypeVar("T")

# What libraries say in a plain RuntimeError when an allocation fails inside them.
_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no room for cuBLAS's workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # torch's CPU allocator
)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


_ADVICE = (
    "Close other programs on the device, or use a smaller rank, a shorter max_length, quantize='4bit' or a smaller model: "
    "`local-tinker plan` shows what each saves"
)


def until_it_fits(attempt: Callable[[], T], *, step_down: Callable[[], bool], advice: str = _ADVICE) -> T:
    """Call `attempt`, and again after each `step_down`, until it does not run out of memory.

    Args:
        attempt: leaves state as it was when it raises, and gives the same result every time but for the plan.
        step_down: makes the next attempt need less; False when nothing smaller is left.
        advice: what the user can do then.

    Raises:
        DeviceMemoryError: nothing smaller is left.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            cause = str(error).partition("\n")[0].partition(". ")[0]
        # Only here, outside the except block, is the traceback gone, and with it the frames that hold the attempt's
        # tensors (pytorch#27600): memory given back inside it would not come back.
        give_back()
        if not step_down():
            raise DeviceMemoryError(
                f"out of memory ({cause}), and no smaller plan is left; nothing has changed. {advice}"
            )


def give_back() -> None:
    """Return unused memory to the device. Graph nodes and their tensors may be in reference cycles."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
