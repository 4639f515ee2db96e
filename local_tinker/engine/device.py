"""The device an engine owns, made ready."""

from __future__ import annotations

import os

import torch

_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch 2.9 renamed it


def own(kind: str) -> torch.device:
    """The torch device, by number where there may be several.

    Micro-batches differ in length, and torch's allocator keeps blocks of every size it met: near the card's limit a third
    of the memory can lie in pieces that fit nothing. Expandable segments avoid that; a user's own settings stand.
    """
    if kind != "cuda":
        return torch.device(kind)
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if change is not None and not any(name in os.environ for name in _SETTINGS):
        change("expandable_segments:True")
    return torch.device(kind, 0)
