"""Local Tinker: fine-tune open-weight language models on your own GPU with four verbs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data.batches import batches
    from .data.read import load_rows
    from .errors import LocalTinkerError
    from .rewards import reward
    from .sampling import SamplingClient
    from .service import ServiceClient
    from .training import TrainingClient
    from .types import AdamParams, Completion, Datum, LossResult, ModelInput, Rollout, StepResult

# Where each public name lives; looked up on first use, so that importing the package loads no torch.
_HOMES = {
    "AdamParams": "types",
    "Completion": "types",
    "Datum": "types",
    "LocalTinkerError": "errors",
    "LossResult": "types",
    "ModelInput": "types",
    "Rollout": "types",
    "SamplingClient": "sampling",
    "ServiceClient": "service",
    "StepResult": "types",
    "TrainingClient": "training",
    "batches": "data.batches",
    "load_rows": "data.read",
    "reward": "rewards",
}

__all__ = [
    "AdamParams",
    "Completion",
    "Datum",
    "LocalTinkerError",
    "LossResult",
    "ModelInput",
    "Rollout",
    "SamplingClient",
    "ServiceClient",
    "StepResult",
    "TrainingClient",
    "batches",
    "load_rows",
    "reward",
]


def __getattr__(name: str):
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("local-tinker")
        except metadata.PackageNotFoundError:
            return "0.0.0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
