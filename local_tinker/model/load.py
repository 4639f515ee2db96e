"""transformers loads and names, bitsandbytes quantises: a folder -> a prepared, frozen model on one device.

Every linear projection but the output head becomes a `FrozenLinear`. Weights are quantised on the device one module at a
time, so the peak is the quantised model plus one projection.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, UsageError
from .agree import relative_gap
from .decode import DecodeRoad
from .head import Head
from .kernels import fault
from .linear import QUANTISERS, FrozenLinear
from .loaded import LoadedModel
from .plain import PlainRoad, probe
from .road import FastRoad, collect
from .spec import FamilySpec, Refusal, spec_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PROBE_TOKENS = 64
# Relative difference between two roads that compute the same thing in other groupings. transformers' norms and softmax
# go through float32 even in a float64 model.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def load_model(
    path: str | Path,
    *,
    quantize: str | None,
    dtype: str,
    device: str | torch.device,
    plain_road: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> LoadedModel:
    """Load a model folder, freeze and quantise it, and choose its road.

    Args:
        path: a folder with config.json, safetensors weights and tokenizer files.
        quantize: "4bit" (NF4, double quantised), "8bit" (row-wise int8) or None.
        dtype: the compute type, one of `DTYPES`.
        plain_road: take the plain road whatever the family, to compare the fast road with.

    Raises:
        UsageError: unknown quantize or dtype. ModelError: the folder cannot be loaded, with what is wrong.
    """
    if quantize not in QUANTISERS:
        raise UsageError(f"quantize={quantize!r} is not known; use '4bit', '8bit' or None")
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    folder, device, compute = Path(path), torch.device(device), DTYPES[dtype]
    model, tokenizer = _from_folder(folder, compute)
    base = _freeze(model, quantize=quantize, dtype=compute, device=device)
    text_config = model.config.get_text_config()
    head, head_path = _head(model, text_config)
    plain = PlainRoad(model)
    loaded = LoadedModel(
        config=text_config,
        tokenizer=tokenizer,
        projections=base,
        plain=plain,
        fast=None,
        head=head,
        head_path=head_path,
        stop_ids=stop_ids(model, tokenizer),
        fingerprint=fingerprint(folder),
        quantize=quantize,
        dtype=compute,
        device=device,
    )
    if device.type == "cpu":
        loaded.hold_weights()  # the probes below would dequantise every weight several times, which a CPU does slowly
    _check_head(model, loaded)
    loaded.fast = None if plain_road else _fast_road(model, text_config, loaded)
    if device.type == "cuda" and (reason := fault("cuda")) is not None:
        loaded.said.append(f"fused kernels are off and plain torch runs instead: {reason}")
    elif device.type == "cuda" and loaded.fast is not None and (parts := DecodeRoad(loaded.fast).unfused()):
        loaded.said.append(f"in sampling, {' and '.join(parts)} run on torch operations")
    loaded.release_weights()
    for line in loaded.said:
        say(line)
    return loaded


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; give a folder that transformers' save_pretrained wrote")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no .safetensors weights; pickled weights are not loaded, convert them first")
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"{folder} did not load as a causal language model: {error}") from error
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    model.config.use_cache = False
    return model, tokenizer


def _freeze(
    model: nn.Module, *, quantize: str | None, dtype: torch.dtype, device: torch.device
) -> dict[str, FrozenLinear]:
    """Replace projections by frozen ones on the device, then move what is left. Buffers such as inv_freq keep fp32."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    projections: dict[str, FrozenLinear] = {}
    for path, module in list(model.named_modules()):
        if module is head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = module.weight.data.t() if isinstance(module, Conv1D) else module.weight.data  # Conv1D stores (in, out)
        frozen = FrozenLinear(
            weight.to(device=device, dtype=dtype).contiguous(),
            None if module.bias is None else module.bias.data.to(device),
            quantize=quantize,
            dtype=dtype,
            path=path,
        )
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, frozen)
        projections[path] = frozen
    model.to(device)
    model.requires_grad_(False)
    model.eval()
    return projections


def _head(model: nn.Module, config: Any) -> tuple[Head, str]:
    output = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is output), "lm_head")
    # Granite divides by logits_scaling, Cohere multiplies by logit_scale.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(
        weight=output.weight.data,
        bias=None if getattr(output, "bias", None) is None else output.bias.data,
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale,
    )
    return head, path


def _probe_tokens(loaded: LoadedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, loaded.vocab_size, (PROBE_TOKENS,), generator=generator).to(loaded.device)


@torch.no_grad()
def _check_head(model: nn.Module, loaded: LoadedModel) -> None:
    """Our head against the model's own logits: a model that scales or shapes its logits in a way we do not know is refused."""
    tokens = _probe_tokens(loaded)[None, :8]
    theirs = model(input_ids=tokens, use_cache=False).logits[0].float()
    base = model.get_decoder()
    ours = loaded.head.logits(base(input_ids=tokens, use_cache=False).last_hidden_state[0]).float()
    gap = relative_gap(ours, theirs)
    if not gap <= PROBE_TOLERANCE[loaded.dtype]:
        raise ModelError(
            f"the logits of {type(model).__name__} are not its head times its hidden states (relative difference {gap:.2g}); "
            "this architecture shapes its logits in a way that is not supported"
        )


def _fast_road(model: nn.Module, config: Any, loaded: LoadedModel) -> FastRoad | None:
    """The fast road when the family is known and a probe agrees with the plain road; else None, and why is said."""
    spec: FamilySpec | Refusal = spec_for(config)
    slow = "" if loaded.plain.packed else f"; one document a row and no cache in sampling: {loaded.plain.reason}"
    if isinstance(spec, Refusal):
        loaded.said.append(f"{config.model_type} runs on the plain road: {spec.reason}{slow}")
        return None
    fast = FastRoad(spec, collect(model, spec))
    agrees, gap = probe(fast, loaded.plain, _probe_tokens(loaded), tolerance=PROBE_TOLERANCE[loaded.dtype])
    if not agrees:
        loaded.said.append(
            f"{config.model_type} runs on the plain road: the fast road differs from it by {gap:.2g} on a probe"
        )
        return None
    return fast


def stop_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a turn: of the generation config (one or a list), of the config and of the tokenizer."""
    found: set[int] = set()
    for value in (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            found |= {int(v) for v in (value if isinstance(value, (list, tuple)) else [value])}
    return frozenset(found)


def fingerprint(folder: Path) -> str:
    """Identify the weights without reading all of them: names, sizes, safetensors headers and sampled blocks, hashed."""
    sha = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        sha.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            header = struct.unpack("<Q", file.read(8))[0]
            sha.update(file.read(min(header, 1 << 26)))
            for i in range(32):
                file.seek(8 + header + (size - 8 - header) * i // 32)
                sha.update(file.read(4096))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    sha.update(json.dumps(config, sort_keys=True).encode())
    return sha.hexdigest()
