"""LocalEngine: base models, trainers and snapshots of one device in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load

from ..errors import CheckpointError, StateError, UsageError
from ..model.adapter import Adapter, AdapterSpec, choose_targets
from ..model.decode import DecodeRoad
from ..model.load import fingerprint, load_model
from ..model.loaded import LoadedModel
from ..out_of_memory import give_back, until_it_fits
from ..sampler.decode import Progress, SamplerEngine
from ..sampler.sequence import Delta, Finished, Request, derive_seed
from ..types import AdamParams, LossResult, StepResult
from .base import AdapterOptions, BaseInfo, LossCall, SavedAdapter, Scores, SnapshotInfo, TrainerState, Unit
from .device import own
from .planning import Budget, plan_budget
from .state import export_state, import_state, require_no_gradients, saved_adapter, state_bytes
from .step import Weights
from .trainer import Trainer
from .turns import Turns

END = object()
PREFILL = {"cuda": 8192, "cpu": 1024}  # prompt tokens of one forward


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Weights as they were: a copy of the adapter in the compute type."""

    info: SnapshotInfo
    model: LoadedModel
    weights: Weights


class LocalEngine:
    """Owns one device. Verbs of several threads take turns; sampling gives way between tokens.

    Args:
        plain_road: every model takes the plain road, transformers' own modules, to compare the fast road with.
    """

    def __init__(self, device: str, *, plain_road: bool = False) -> None:
        self.device = own(device)
        self._plain_road = plain_road
        self._turn = Turns()
        self._numbers = itertools.count(1)
        self._bases: dict[str, tuple[LoadedModel, BaseInfo]] = {}
        self._trainers: dict[str, tuple[Trainer, str]] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._samplers: dict[LoadedModel, SamplerEngine] = {}

    # -- bases -------------------------------------------------------------------------------------------------------

    def load_base(
        self, path: str, *, name: str, quantize: str | None, dtype: str, say: Callable[[str], None] = lambda line: None
    ) -> BaseInfo:
        """Load a base once; the same folder, quantiser and type give the one already there."""
        with self._turn():
            id = f"{path}|{fingerprint(Path(path))[:12]}|{quantize}|{dtype}"
            if id not in self._bases:
                model = load_model(
                    path, quantize=quantize, dtype=dtype, device=self.device, plain_road=self._plain_road, say=say
                )
                self._bases[id] = (model, _info(id, name, model, self.device))
            return self._bases[id][1]

    def _base(self, base_id: str) -> LoadedModel:
        if base_id not in self._bases:
            raise StateError("this base model was released; create a new client from the ServiceClient")
        return self._bases[base_id][0]

    # -- trainers ----------------------------------------------------------------------------------------------------

    def create_trainer(
        self,
        base_id: str,
        options: AdapterOptions,
        *,
        start: SavedAdapter | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> str:
        """A fresh adapter, or one continued from saved weights, which then are also the reference of DPO and of KL terms."""
        with self._turn():
            model = self._base(base_id)
            spec = _adapter_spec(model, options, start)
            if options.compute == "fp8" and (reason := model.fp8_fault()) is not None:
                raise UsageError(f'compute="fp8" does not run here: {reason}; use compute=None')
            budget = plan_budget(
                model, spec, micro_batch_tokens=options.micro_batch_tokens, fp8=options.compute == "fp8"
            )
            trainer = until_it_fits(
                lambda: Trainer(model, spec, budget, say=say, spare=self._spare), step_down=self._spare
            )
            trainer.make_room()
            if start is not None:
                with torch.no_grad():
                    trainer.adapter.load(trainer.adapter.master, load(start.tensors), what="saved adapter")
                    trainer.adapter.refresh()
                    trainer.reference = trainer.adapter.compute.clone()
            id = f"trainer-{next(self._numbers)}"
            self._trainers[id] = (trainer, base_id)
            return id

    def _trainer(self, trainer_id: str) -> Trainer:
        if trainer_id not in self._trainers:
            raise StateError("this training client was closed; create a new one, or load a saved state")
        return self._trainers[trainer_id][0]

    def try_longest(self, trainer_id: str, lengths: Sequence[Sequence[int]]) -> None:
        with self._turn():
            self._trainer(trainer_id).try_longest(lengths)

    def forward_backward(self, trainer_id: str, call: LossCall) -> LossResult:
        with self._turn():
            return self._trainer(trainer_id).forward_backward(call)

    def forward(self, trainer_id: str, call: LossCall) -> LossResult:
        with self._turn():
            return self._trainer(trainer_id).forward(call)

    def score(self, trainer_id: str, units: Sequence[Unit], *, values: bool = False, reference: bool = False) -> Scores:
        with self._turn():
            return self._trainer(trainer_id).score(units, values=values, reference=reference)

    def optim_step(self, trainer_id: str, params: AdamParams, *, value_learning_rate: float) -> StepResult:
        with self._turn():
            return self._trainer(trainer_id).optim_step(params, value_learning_rate=value_learning_rate)

    def discard_gradients(self, trainer_id: str) -> None:
        with self._turn():
            self._trainer(trainer_id).discard_gradients()

    def step_count(self, trainer_id: str) -> int:
        with self._turn():
            return self._trainer(trainer_id).step

    def linear_paths(self, base_id: str) -> tuple[str, ...]:
        """Every projection that can carry LoRA, by module path."""
        with self._turn():
            return tuple(self._base(base_id).projections)

    def version(self, trainer_id: str) -> str:
        with self._turn():
            return self._trainer(trainer_id).version

    def export_state(self, trainer_id: str, *, ignore_gradients: bool = False) -> TrainerState:
        with self._turn():
            trainer = self._trainer(trainer_id)
            if not ignore_gradients:
                require_no_gradients(trainer)
            return export_state(trainer)

    def import_state(
        self, trainer_id: str, state: TrainerState, *, ignore_gradients: bool = False, keep_cut: bool = False
    ) -> None:
        with self._turn():
            trainer = self._trainer(trainer_id)
            if not ignore_gradients:
                require_no_gradients(trainer)
            import_state(trainer, state, keep_cut=keep_cut)

    def state_bytes(self, trainer_id: str) -> int:
        with self._turn():
            return state_bytes(self._trainer(trainer_id))

    def export_adapter(self, trainer_id: str) -> SavedAdapter:
        with self._turn():
            return saved_adapter(self._trainer(trainer_id))

    # -- snapshots and sampling --------------------------------------------------------------------------------------

    def snapshot(self, trainer_id: str) -> SnapshotInfo:
        """Copy the adapter as it is now: tens of megabytes, no disk."""
        with self._turn():
            trainer = self._trainer(trainer_id)
            pairs = trainer.adapter.views(trainer.adapter.compute.clone())
            seed = derive_seed(trainer.spec.seed, trainer.step)
            return self._keep(self._trainers[trainer_id][1], pairs, trainer.spec.scale, trainer.version, seed)

    def adapter_snapshot(self, base_id: str, adapter: SavedAdapter | None, *, seed: int) -> SnapshotInfo:
        """The base alone, or with a saved adapter."""
        with self._turn():
            if adapter is None:
                return self._keep(base_id, {}, 1.0, f"{self._base(base_id).fingerprint[:8]}/base/{seed}", seed)
            model = self._base(base_id)
            values = Adapter(_saved_spec(model, adapter, dropout=0.0, seed=seed), dtype=model.dtype, device=self.device)
            with torch.no_grad():
                values.load(values.master, load(adapter.tensors), what="saved adapter")
                values.refresh()
            return self._keep(
                base_id,
                values.views(values.compute),
                values.spec.scale,
                f"{model.fingerprint[:8]}/saved-{next(self._numbers)}",
                seed,
            )

    def _keep(self, base_id: str, pairs: dict, scale: float, version: str, seed: int) -> SnapshotInfo:
        model = self._base(base_id)
        info = SnapshotInfo(f"snapshot-{next(self._numbers)}", base_id, version, seed)
        self._snapshots[info.id] = Snapshot(info, model, Weights(pairs, scale, model.head_path))
        return info

    def _snapshot(self, snapshot_id: str) -> Snapshot:
        if snapshot_id not in self._snapshots:
            raise StateError("this sampling client was closed; make a new one from its training client")
        return self._snapshots[snapshot_id]

    def _sampler(self, snapshot: Snapshot) -> SamplerEngine:
        """The base's sampler, within what memory allows now. It outlives a run: what it has laid out and captured stays."""
        model = snapshot.model
        kept = 0 if model not in self._samplers else self._samplers[model].kept_bytes
        budget: Budget = plan_budget(model, None, micro_batch_tokens=None, kept_bytes=kept)
        training = [trainer for trainer, _ in self._trainers.values() if trainer.model is model]
        model.release_fp8()
        if budget.hold_weights:
            model.hold_weights(rank=max((trainer.spec.rank for trainer in training), default=0))
        if model not in self._samplers:
            self._samplers[model] = _sampler_for(model, budget, spare=self._spare)
        sampler = self._samplers[model]
        sampler.token_budget = budget.sampler_tokens
        # Between runs the cache's storage stays only where training does not want the memory.
        sampler.keep_bytes = budget.spare_bytes(*(trainer.budget for trainer in training))
        return sampler

    def _spare(self) -> bool:
        """Let go of what samplers keep between their runs; whether there was something."""
        kept = sum(sampler.kept_bytes for sampler in self._samplers.values())
        for sampler in self._samplers.values():
            sampler.drop_idle()
        if kept:
            give_back()
        return kept > 0

    def sample(
        self,
        snapshot_id: str,
        requests: Sequence[Request],
        *,
        stream: bool = False,
        progress: Callable[[Progress], None] | None = None,
        deterministic: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> Iterator[Delta | Finished]:
        """Events of all requests; the device is free for others between two of them."""
        with self._turn():
            snapshot = self._snapshot(snapshot_id)
            events = self._sampler(snapshot).run(
                requests,
                pairs=snapshot.weights.pairs,
                scale=snapshot.weights.scale,
                tokenizer=snapshot.model.tokenizer,
                stream=stream,
                progress=progress,
                pauses=True,
                deterministic=deterministic,
                say=say,
            )
        return self._in_turns(events)

    def _in_turns(self, events: Iterator[Delta | Finished | None]) -> Iterator[Delta | Finished]:
        """One turn an event; a None is a pause between two tokens, where others may go first."""
        try:
            while True:
                with self._turn():
                    event = next(events, END)
                if event is END:
                    return
                if event is not None:
                    yield event
        finally:
            with self._turn():
                events.close()

    def compute_logprobs(self, snapshot_id: str, tokens: Sequence[int]) -> list[float | None]:
        """Log-prob of each token given those before it; None for the first."""
        with self._turn():
            snapshot = self._snapshot(snapshot_id)
            return self._sampler(snapshot).prompt_logprobs(
                tokens, pairs=snapshot.weights.pairs, scale=snapshot.weights.scale
            )

    # -- the end -----------------------------------------------------------------------------------------------------

    def release(self, kind: str, id: str) -> None:
        """Let go of a trainer or a snapshot, now or with the next verb; unknown ids are already gone. Takes no lock, so
        that garbage collection may call it."""
        table = {"trainer": self._trainers, "snapshot": self._snapshots}[kind]
        self._turn.later(lambda: table.pop(id, None))

    def release_all(self) -> None:
        with self._turn():
            for table in (self._trainers, self._snapshots, self._samplers, self._bases):
                table.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _sampler_for(model: LoadedModel, budget: Budget, *, spare: Callable[[], bool]) -> SamplerEngine:
    dims = model.dims
    fused = None if model.fast is None else DecodeRoad(model.fast)
    return SamplerEngine(
        model.road,
        model.head,
        layers=dims.layers,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        dtype=model.dtype,
        device=model.device,
        max_rows=budget.sampler_rows,
        token_budget=budget.sampler_tokens,
        max_positions=model.cached_positions,
        vocab_size=model.vocab_size,
        head_path=model.head_path,
        prefill_chunk=PREFILL[model.device.type],
        fused=fused,
        spare=spare,
    )


def _info(id: str, name: str, model: LoadedModel, device: torch.device) -> BaseInfo:
    return BaseInfo(
        id=id,
        name=name,
        tokenizer=model.tokenizer,
        stop_ids=model.stop_ids,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        fingerprint=model.fingerprint,
        quantize=model.quantize,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        road=model.road.name,
        said=tuple(model.said),
    )


def _shapes(model: LoadedModel, paths: Sequence[str]) -> tuple[tuple[str, tuple[int, int]], ...]:
    known: dict[str, tuple[int, int]] = {
        path: (linear.out_features, linear.in_features) for path, linear in model.projections.items()
    }
    known[model.head_path] = tuple(model.head.weight.shape)
    missing = [path for path in paths if path not in known]
    if missing:
        raise CheckpointError(
            f"the adapter has {missing[0]}, which this model has not; was it made for another base model?"
        )
    return tuple((path, known[path]) for path in paths)


def _adapter_spec(model: LoadedModel, options: AdapterOptions, start: SavedAdapter | None) -> AdapterSpec:
    if start is not None:
        return _saved_spec(model, start, dropout=options.dropout, seed=options.seed)
    paths = choose_targets(list(model.projections), options.targets)
    if options.train_unembed:
        paths = (*paths, model.head_path)
    return AdapterSpec(options.rank, options.alpha, _shapes(model, paths), dropout=options.dropout, seed=options.seed)


def _saved_spec(model: LoadedModel, saved: SavedAdapter, *, dropout: float, seed: int) -> AdapterSpec:
    order = {path: i for i, path in enumerate([*model.projections, model.head_path])}
    paths = sorted(saved.paths, key=lambda path: order.get(path, len(order)))
    return AdapterSpec(saved.rank, saved.alpha, _shapes(model, paths), dropout=dropout, seed=seed)
