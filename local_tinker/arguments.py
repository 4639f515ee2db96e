"""What callers hand to the clients: kinds of batches, optimiser settings, and keywords that other tools call otherwise."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import UsageError
from .types import AdamParams, Completion, Rollout

# Keywords of Hugging Face, TRL, PEFT and vLLM -> ours.
_ELSEWHERE = {
    "lr": "learning_rate",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "torch_dtype": "dtype",
    "random_state": "seed",
    "load_in_4bit": 'quantize="4bit"',
    "load_in_8bit": 'quantize="8bit"',
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_completion_length": "max_tokens",
    "do_sample": "temperature (0 takes the most likely token)",
    "stop_strings": "stop",
    "stop_token_ids": "stop",
    "eos_token_id": "stop",
    "num_return_sequences": "n",
    "num_generations": "n",
    "betas": "beta1 and beta2",
    "epsilon": "eps",
    "max_grad_norm": "grad_clip_norm",
}


def refuse_unknown(verb: str, function: Callable, unknown: Mapping[str, Any]) -> None:
    """Raise UsageError for keywords that `function` does not have, with the name meant."""
    if not unknown:
        return
    word = next(iter(unknown))
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    known.remove("self")
    meant = _ELSEWHERE.get(word, "")
    if meant.split("=")[0].split(" ")[0] not in known:
        meant = next(iter(difflib.get_close_matches(word, known, 1)), "")
    hint = f": write {meant}" if meant else ""
    raise UsageError(f"{verb} has no keyword {word!r}{hint}; it takes {', '.join(known)}")


def holds_rollouts(batch: Any) -> bool:
    """Completions or rollouts, flat or in groups; a group that holds plain text among them is one to refuse later."""
    if isinstance(batch, (str, Mapping)) or not isinstance(batch, Sequence):
        return False
    for item in batch:
        if isinstance(item, (Completion, Rollout)):
            return True
        if isinstance(item, (list, tuple)) and any(isinstance(one, (Completion, Rollout, str)) for one in item):
            return True
    return False


def adam_fields(params: Any) -> dict[str, Any]:
    """The fields of our or Tinker's AdamParams, or of a mapping."""
    fields = AdamParams.__dataclass_fields__
    if params is None:
        return {}
    if isinstance(params, Mapping):
        unknown = [name for name in params if name not in fields]
        if unknown:
            raise UsageError(f"optim_step has no setting {unknown[0]!r}; it takes {', '.join(fields)}")
        return dict(params)
    if not hasattr(params, "learning_rate"):
        raise UsageError(
            f"optim_step takes AdamParams or keywords, got {type(params).__name__}; write optim_step(learning_rate=...)"
        )
    return {name: getattr(params, name) for name in fields if hasattr(params, name)}


def kind_of(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "columns"
    try:
        return f"{type(next(iter(batch))).__name__}s"
    except (TypeError, StopIteration):
        return type(batch).__name__
