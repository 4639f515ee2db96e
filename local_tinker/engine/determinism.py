"""The stated mode in which a GPU gives the same bits again."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def make_deterministic(*, say: Callable[[str], None]) -> None:
    """Only kernels that repeat bit for bit, for the whole process: sums without atomics, cuBLAS with a fixed workspace.

    Same versions, same card, same cut into micro-batches give the same bits; another card or another cut does not.
    """
    # Read once, when cuBLAS makes its handle; a process that has used the card may have made it.
    if _WORKSPACE not in os.environ:
        if torch.cuda.is_initialized():
            say(
                f"deterministic=True came after the card was first used; set {_WORKSPACE}=:4096:8 before starting Python"
            )
        os.environ[_WORKSPACE] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # filling fresh memory with NaN is for finding bugs and costs a pass over every buffer
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
