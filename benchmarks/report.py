"""What every benchmark shares: the machine it ran on, versions, and one JSON file a run in benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("local-tinker", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "triton")


def machine() -> dict:
    """Card, cores, memory and the versions of what was measured."""
    from local_tinker.hardware import detect

    hardware = detect()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": hardware.name,
        "kind": hardware.kind,
        "memory_gib": round(hardware.total_bytes / 2**30, 1),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write(name: str, figures: dict, *, folder: Path = RESULTS) -> Path:
    """Write benchmarks/results/<name>.json; the figures, the machine, the day."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {"benchmark": name, "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "figures": figures}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
