"""The catalogue against a device: what each model needs and whether it fits."""

from __future__ import annotations

from typing import Any

from ..hardware import Hardware
from ..model import catalogue
from .footprint import TrainSettings
from .memory import COMFORTABLE_TOKENS, least_bytes, status


def model_table(
    hardware: Hardware | None, *, quantize: str = "4bit", free_bytes: int | None = None
) -> list[dict[str, Any]]:
    """One dict a model: name, hub_id, license, gated, params, quantize, vram_bytes, status, on_disk.

    Args:
        hardware: the device that would train; None stands for a bf16 card with `free_bytes`.
        free_bytes: None takes what the hardware has free now.
    """
    if hardware is None:
        settings = TrainSettings(quantize=quantize)
    else:
        compute_bytes = 2 if hardware.bf16 else 4
        settings = TrainSettings(kind=hardware.kind, quantize=quantize, compute_bytes=compute_bytes)
    free = hardware.free_bytes if free_bytes is None else free_bytes
    return [
        {
            "name": entry.alias,
            "hub_id": entry.hub_id,
            "license": entry.license,
            "gated": entry.gated,
            "params": entry.dims.params,
            "quantize": quantize,
            "vram_bytes": least_bytes(entry.dims, settings, COMFORTABLE_TOKENS),
            "status": status(entry.dims, free, settings),
            "on_disk": catalogue.on_disk(entry),
        }
        for entry in catalogue.entries()
    ]
