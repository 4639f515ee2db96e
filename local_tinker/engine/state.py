"""A trainer's state as bytes and back: adapter, moments, value head, reference, counters."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..errors import CheckpointError, StateError
from ..model.adapter import Adapter
from .base import SavedAdapter, TrainerState
from .footprint import Choice
from .interrupts import finish_first
from .optimiser import FlatAdamW
from .trainer import Trainer

ADAPTER, OPTIMISER, VALUE_HEAD, REFERENCE = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "value_head.safetensors",
    "reference.safetensors",
)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _named_bytes(adapter: Adapter, flat: Tensor) -> bytes:
    return save({name: _host(view) for name, view in adapter.named(flat).items()})


def saved_adapter(trainer: Trainer) -> SavedAdapter:
    spec, adapter = trainer.spec, trainer.adapter
    return SavedAdapter(spec.rank, spec.alpha, spec.paths, _named_bytes(adapter, adapter.master))


def state_bytes(trainer: Trainer) -> int:
    """Bytes of the tensors that `export_state` writes: adapter and two moments, the same of a value head, a reference."""
    value = trainer.model.head.weight.shape[1] + 1  # counted before PPO makes it, so that a plan need not know the loss
    sizes = 3 * (trainer.spec.numel + value) * trainer.adapter.master.itemsize
    return sizes + (0 if trainer.reference is None else trainer.reference.nbytes)


_PROBE = "The  quick\n\tbrown fox, 0123456789: \u00e9\u4e2d\U0001f642 don't?"


def tokenizer_digest(tokenizer: Any) -> str:
    """Names what text becomes which ids: size, and a hash of vocabulary, special tokens and the ids of a probe text."""
    sha = hashlib.sha256()
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    for part in (vocabulary, sorted(tokenizer.special_tokens_map.items()), tokenizer(_PROBE)["input_ids"]):
        sha.update(repr(part).encode())
    return f"{len(vocabulary)} tokens, {sha.hexdigest()[:12]}"


def geometry(trainer: Trainer) -> dict[str, Any]:
    """What a state must have in common with the trainer that loads it."""
    spec, model = trainer.spec, trainer.model
    template = repr(model.tokenizer.chat_template).encode()
    return {
        "base_fingerprint": model.fingerprint,
        "tokenizer": tokenizer_digest(model.tokenizer),
        "chat_template": hashlib.sha256(template).hexdigest()[:12],
        "quantize": model.quantize,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rank": spec.rank,
        "alpha": spec.alpha,
        "dropout": spec.dropout,
        "paths": list(spec.paths),
    }


def require_no_gradients(trainer: Trainer) -> None:
    """
    Raises:
        StateError: gradients are pending; they would be lost.
    """
    if not trainer.window.empty:
        raise StateError(
            f"{trainer.window.calls} forward_backward calls have not been applied and would be lost: "
            "call optim_step first, or pass discard_gradients=True"
        )


def export_state(trainer: Trainer) -> TrainerState:
    """The state after the last optimiser step; pending gradients are not part of it."""
    adapter, optimiser = trainer.adapter, trainer.optimiser
    moments = {
        f"{moment}.{name}": _host(view)
        for moment in ("m", "v")
        for name, view in adapter.named(getattr(optimiser, moment)).items()
    }
    moments["count"] = _host(optimiser.count)
    files = {ADAPTER: _named_bytes(adapter, adapter.master), OPTIMISER: save(moments)}
    if trainer.value is not None:
        value = trainer.value.optimiser
        tensors = {"value_head": trainer.value.weights, "m": value.m, "v": value.v, "count": value.count}
        files[VALUE_HEAD] = save({name: _host(tensor) for name, tensor in tensors.items()})
    if trainer.reference is not None:
        files[REFERENCE] = _named_bytes(adapter, trainer.reference)
    meta = {
        "geometry": geometry(trainer),
        "step": trainer.step,
        "calls": trainer.calls,
        "uid": trainer.lineage,
        "choice": asdict(trainer.budget.choice),
        "seed": trainer.spec.seed,
        "value_head": trainer.value is not None,
        "reference": trainer.reference is not None,
    }
    return TrainerState(files, meta)


@torch.no_grad()
def import_state(trainer: Trainer, state: TrainerState, *, keep_cut: bool = False) -> None:
    """Continue from a saved state. Everything is checked before anything changes.

    Args:
        keep_cut: leave the cut into micro-batches, tiles and head chunks as this trainer's plan has it. Without it the saved
            one is taken over: a plan follows the memory that happens to be free, and another cut rounds differently.

    Raises:
        CheckpointError: another base, geometry or a missing part, with what differs.
    """
    _compare(geometry(trainer), state.meta["geometry"])
    adapter = trainer.adapter
    fresh = {name: torch.zeros_like(adapter.master) for name in ("master", "m", "v")}
    adapter.load(fresh["master"], load(state.files[ADAPTER]), what=ADAPTER)
    moments = load(_part(state, OPTIMISER))
    for moment in ("m", "v"):
        named = {key[2:]: tensor for key, tensor in moments.items() if key.startswith(f"{moment}.")}
        adapter.load(fresh[moment], named, what=f"{OPTIMISER} ({moment})")
    value = load(_part(state, VALUE_HEAD)) if state.meta["value_head"] else None
    reference = None
    if state.meta["reference"]:
        reference = torch.zeros_like(adapter.compute)
        adapter.load(reference, load(_part(state, REFERENCE)), what=REFERENCE)
    fresh_value = None
    if value is not None:
        fresh_value = trainer.new_value_head()
        if value["value_head"].shape != fresh_value.weights.shape:
            raise CheckpointError(
                f"{VALUE_HEAD} has {value['value_head'].shape[0]} values, this model's needs {fresh_value.weights.shape[0]}"
            )
        fresh_value.weights.copy_(value["value_head"])
        _restore(fresh_value.optimiser, value["m"], value["v"], value["count"])
    with finish_first():
        adapter.master.copy_(fresh["master"])
        _restore(trainer.optimiser, fresh["m"], fresh["v"], moments["count"])
        adapter.refresh()
        trainer.discard_gradients()
        trainer.reference, trainer.value = reference, fresh_value
        trainer.spec = adapter.spec = replace(trainer.spec, seed=state.meta["seed"])
        trainer.calls, trainer.uid, trainer.loaded_step = state.meta["calls"], state.meta["uid"], state.meta["step"]
        trainer.branch = uuid.uuid4().hex[:12]
        if not keep_cut:
            saved = state.meta["choice"]
            trainer.budget = trainer.budget.as_before(Choice(**{**saved, "levels": tuple(saved["levels"])}))


def _restore(optimiser: FlatAdamW, m: Tensor, v: Tensor, count: Tensor) -> None:
    optimiser.m.copy_(m)
    optimiser.v.copy_(v)
    optimiser.count.copy_(count)


def _part(state: TrainerState, name: str) -> bytes:
    if name not in state.files:
        raise CheckpointError(f"the state has no {name}; it was saved by another version or is incomplete")
    return state.files[name]


def _compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [
        f"{key}: saved {_short(theirs.get(key))}, here {_short(value)}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if differing:
        raise CheckpointError(f"this state belongs to another trainer ({'; '.join(differing)})")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} modules ({', '.join(value[:2])}, ...)"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 24 else repr(value)
