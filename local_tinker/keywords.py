"""Calls that do not fit: keywords that other tools call otherwise, typing mistakes, arguments too few or too many."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from .errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

# Keywords of Hugging Face, TRL, PEFT and vLLM -> ours; of several, the one that the call has.
_ELSEWHERE: dict[str, str | tuple[str, ...]] = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "train_attn": "target_modules",
    "train_mlp": "target_modules",
    "model": "base_model",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "max_seq_length": ("max_length", "seq_len"),
    "max_seq_len": ("max_length", "seq_len"),
    "torch_dtype": "dtype",
    "random_state": "seed",
    "load_in_4bit": 'quantize="4bit"',
    "load_in_8bit": 'quantize="8bit"',
    "max_new_tokens": "max_tokens",
    "max_length": ("max_tokens", "seq_len"),
    "max_completion_length": "max_tokens",
    "do_sample": "temperature (0 takes the most likely token)",
    "temp": "temperature",
    "stop_strings": "stop",
    "stop_token_ids": "stop",
    "eos_token_id": "stop",
    "num_return_sequences": "n",
    "num_generations": "n",
    "num_samples": "n",
    "betas": "beta1 and beta2",
    "epsilon": ("eps", "clip_low"),
    "epsilon_high": "clip_high",
    "kl_coef": "beta",
    "dpo_beta": "beta",
    "lam": "gae_lambda",
    "cliprange": "clip_low",
    "vf_coef": "value_coefficient",
    "loss_type": ("variant", "aggregation"),
    "max_grad_norm": "grad_clip_norm",
}
_RATE = "optim_step(learning_rate=...)"
_BATCH = "batches(rows, batch_size=...), which is the effective size and is cut to fit memory"
_MANY = "sample_batch([prompt], n=...)"
# Settings that are known by these names and belong to another call, or to none.
_ANOTHER_CALL = {
    "lr": _RATE,
    "learning_rate": _RATE,
    "weight_decay": "optim_step(weight_decay=...)",
    "warmup_steps": f"a rate that you give each step: {_RATE}",
    "lr_scheduler_type": f"a rate that you give each step: {_RATE}",
    "batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "epochs": "batches(rows, epochs=...)",
    "num_train_epochs": "batches(rows, epochs=...)",
    "n": _MANY,
    "num_samples": _MANY,
    "num_return_sequences": _MANY,
    "sampling_params": "keywords here, such as max_tokens=64",
    "device_map": "ServiceClient(device=...)",
    "gradient_checkpointing": "decided by the memory plan",
    "use_gradient_checkpointing": "decided by the memory plan",
    "packing": "always so: rows share micro-batches without padding",
    "loss": "forward_backward(loss_fn=...)",
    "api_key": "not needed: everything runs on this machine",
    "base_url": "not needed: everything runs on this machine",
}


def meant(word: str, known: Collection[str]) -> str:
    """Which of `known` was most likely meant by a name of another tool or a typing mistake; or nothing."""
    ours = _ELSEWHERE.get(word, ())
    for name in (ours,) if isinstance(ours, str) else ours:
        if name.split("=")[0].split(" ")[0] in known:
            return name
    if word in _ANOTHER_CALL:
        return ""
    return next(iter(difflib.get_close_matches(word, known, 1)), "")


def hint(word: str, known: Collection[str]) -> str:
    """What to write instead of an unknown name, to stand after it in a message; or nothing."""
    ours = meant(word, known)
    if ours:
        return f": write {ours}"
    return f": it is {_ANOTHER_CALL[word]}" if word in _ANOTHER_CALL else ""


def known_keywords(function: F) -> F:
    """Decorator of functions, methods and classes: a call that does not fit the signature raises UsageError.

    It says which keyword was meant, which argument is missing, came twice or has no place, and which switch (a parameter
    annotated `bool`) is not True or False: bool("false") is True.
    """
    if isinstance(function, type):
        function.__init__ = known_keywords(function.__init__)
        return function
    signature = inspect.signature(function)
    switches = [name for name, each in signature.parameters.items() if each.annotation in (bool, "bool")]
    verb = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        try:
            bound = signature.bind(*args, **given)
        except TypeError:
            raise UsageError(_misfit(verb, signature, args, given)) from None
        for name in switches:
            _check_switch(name, bound.arguments.get(name, False))
        return function(*args, **given)

    return checked


def _misfit(verb: str, signature: inspect.Signature, args: tuple[Any, ...], given: Mapping[str, Any]) -> str:
    """Why a call does not fit: what came, what is allowed, what to do."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    every = {name: each for name, each in signature.parameters.items() if each.kind in kinds}
    own = 1 if next(iter(every), "") in ("self", "cls") else 0
    known, open_ended = list(every)[own:], len(every) < len(signature.parameters)
    takes = f"it takes {', '.join(known) or 'no arguments'}"
    for word in given:
        if word not in known and not open_ended:
            return f"{verb} has no keyword {word!r}{hint(word, known)}; {takes}"
    placed = [name for name in known if every[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    came = len(args) - own
    if came > len(placed):
        allowed = (
            f"at most {len(placed)} without their names ({', '.join(placed)})" if placed else "none without a name"
        )
        named = [name for name in known if name not in placed]
        do = f"name the rest: {', '.join(f'{name}=' for name in named)}" if named else "leave the rest out"
        return f"{verb} got {came} argument{'s' if came > 1 else ''} and takes {allowed}; {do}"
    twice = [name for name in placed[:came] if name in given]
    if twice:
        return f"{verb} got {twice[0]} twice, by its place and as {twice[0]}=; give it once"
    missing = [n for n in known if every[n].default is inspect.Parameter.empty and n not in {*placed[:came], *given}]
    return f"{verb} was called without {', '.join(missing)}; {takes}"


def _check_switch(name: str, value: Any) -> None:
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's too
        raise UsageError(f"{name} must be True or False, got {value!r}")
