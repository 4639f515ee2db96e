"""An adapter as the folder PEFT writes and reads: config, weights, tokenizer, chat template, a card."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import read_folder, write_folder
from .engine.base import SavedAdapter
from .errors import CheckpointError, MissingDependencyError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_OURS = (
    "use_dora",
    "use_rslora",
    "modules_to_save",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
)


def target_modules(paths: Sequence[str], linear_paths: Sequence[str]) -> list[str]:
    """The shortest PEFT `target_modules` that mean exactly `paths`: module names where each names only adapted modules."""
    chosen = set(paths)
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    reached = {path for path in linear_paths if path.rsplit(".", 1)[-1] in names}
    return names if reached <= chosen else sorted(paths)


def adapter_config(adapter: SavedAdapter, *, base_name: str, linear_paths: Sequence[str]) -> dict[str, Any]:
    """PEFT's own description of the adapter, as PEFT serialises it."""
    from .model.linear import bitsandbytes

    with contextlib.suppress(MissingDependencyError):
        bitsandbytes()  # PEFT imports it where it is installed; ours keeps it from asking a hub for kernels
    from peft import LoraConfig

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=target_modules(adapter.paths, linear_paths),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_name,
    ).to_dict()
    return {
        key: sorted(value) if isinstance(value, (set, frozenset)) else value
        for key, value in config.items()
        if value is not None
    }


def tokenizer_files(tokenizer: Any, chat_template: str | None) -> dict[str, bytes]:
    """What `save_pretrained` writes; with the template that training used, when the tokenizer has none of its own."""
    own = tokenizer.chat_template
    try:
        if own is None and chat_template is not None:
            tokenizer.chat_template = chat_template
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    finally:
        tokenizer.chat_template = own


def model_card(*, base_name: str, adapter: SavedAdapter, step: int) -> str:
    return f"""---
base_model: {base_name}
library_name: peft
---
A LoRA adapter for `{base_name}`: rank {adapter.rank}, alpha {adapter.alpha:g}, {step} optimiser steps, trained with Local Tinker.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base_name}"), "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
"""


def write_adapter(
    target: str | Path,
    adapter: SavedAdapter,
    *,
    base_name: str,
    linear_paths: Sequence[str],
    tokenizer: Any,
    chat_template: str | None,
    meta: Mapping[str, Any],
    overwrite: bool,
) -> Path:
    """Write the folder whole or not at all; plain PEFT loads it."""
    config = adapter_config(adapter, base_name=base_name, linear_paths=linear_paths)
    files = {
        WEIGHTS: adapter.tensors,
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        "README.md": model_card(base_name=base_name, adapter=adapter, step=meta["step"]).encode(),
        **tokenizer_files(tokenizer, chat_template),
    }
    return write_folder(target, files, meta={"kind": "adapter", **meta}, overwrite=overwrite)


def read_adapter(path: str | Path) -> tuple[SavedAdapter, dict[str, Any], dict[str, Any]]:
    """An adapter folder of ours (verified by its manifest) or of PEFT -> (adapter, its config, our meta or {}).

    Raises:
        CheckpointError: files are missing, or the adapter is of a kind that is not trained here, named.
    """
    folder = Path(path)
    if (folder / "MANIFEST.json").is_file():
        checkpoint = read_folder(folder)
        config, weights, meta = json.loads(checkpoint.bytes(CONFIG)), checkpoint.bytes(WEIGHTS), checkpoint.meta
    else:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} is no adapter folder: {name} is missing")
        config, weights, meta = json.loads((folder / CONFIG).read_bytes()), (folder / WEIGHTS).read_bytes(), {}
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} holds a {config.get('peft_type')} adapter; only LORA is supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.split("_")[0].lower() in ("pissa", "olora", "corda", "eva", "loftq"):
        raise CheckpointError(
            f"{folder} was started with init_lora_weights={start!r}, which alters the base; convert it with PEFT first"
        )
    for name in _NOT_OURS:
        if config.get(name):
            raise CheckpointError(f"{folder} uses {name}={config[name]!r}, which is not supported here")
    return SavedAdapter(int(config["r"]), float(config["lora_alpha"]), _paths(weights), weights), config, meta


def _paths(weights: bytes) -> tuple[str, ...]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    suffix, prefix = ".lora_A.weight", "base_model.model."
    try:
        names = sorted(load(weights))
    except SafetensorError as error:
        raise CheckpointError(f"{WEIGHTS} is damaged: {error}") from error
    return tuple(name[len(prefix) : -len(suffix)] for name in names if name.endswith(suffix))
