"""The Engine protocol: the verbs, with plain data in and out.

Clients hold ids and plain data only, so the same verbs can be served by this process, by a server or by many ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..sampler.decode import Progress
from ..sampler.sequence import Delta, Finished, Request
from ..types import AdamParams, Datum, LossResult, StepResult

Unit = tuple[Datum, ...]  # datums that stay in one micro-batch: one of them, or a preference pair


@dataclass(frozen=True)
class BaseInfo:
    """A loaded base model, as clients see it.

    Attributes:
        id: what other verbs take.
        name: what adapters call their base: a hub id where there is one, else the folder.
        tokenizer: transformers' own.
        said: what was decided while loading, one line each.
    """

    id: str
    name: str
    tokenizer: Any
    stop_ids: frozenset[int]
    vocab_size: int
    max_positions: int
    fingerprint: str
    quantize: str | None
    dtype: str
    device: str
    road: str
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterOptions:
    """How an adapter is made: see `ServiceClient.create_lora_training_client`."""

    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    train_unembed: bool
    dropout: float
    seed: int
    micro_batch_tokens: int | None
    compute: str | None


@dataclass(frozen=True)
class LossCall:
    """One forward or forward_backward: units of datums and the loss over them, its options already checked."""

    units: Sequence[Unit]
    loss: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """What `forward` finds, per datum in the order given; a field is None where the call did not ask for it.

    Attributes:
        logprobs: (N,) or (N, K) arrays. values: (N,). reference_logprobs: (N,).
    """

    logprobs: list[np.ndarray]
    values: list[np.ndarray] | None = None
    reference_logprobs: list[np.ndarray] | None = None


@dataclass(frozen=True)
class SnapshotInfo:
    """Weights that never change again."""

    id: str
    base_id: str
    version: str
    seed: int


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter apart from any engine: its geometry and its values under PEFT's names, as safetensors bytes."""

    rank: int
    alpha: float
    paths: tuple[str, ...]
    tensors: bytes


@dataclass(frozen=True)
class TrainerState:
    """Everything that training continues from, as bytes and JSON.

    Attributes:
        files: file name -> safetensors bytes (adapter, optimiser, value head).
        meta: step, counters, geometry, base.
    """

    files: dict[str, bytes]
    meta: dict[str, Any]


class Engine(Protocol):
    """Owner of the device: nothing else touches models, adapters, optimisers or random numbers.

    A verb that raises, however it does, leaves weights, gradients, optimiser and random state as before it.
    """

    def load_base(
        self, path: str, *, name: str, quantize: str | None, dtype: str, say: Callable[[str], None] = ...
    ) -> BaseInfo: ...

    def create_trainer(
        self,
        base_id: str,
        options: AdapterOptions,
        *,
        start: SavedAdapter | None = None,
        say: Callable[[str], None] = ...,
    ) -> str: ...

    def try_longest(self, trainer_id: str, lengths: Sequence[Sequence[int]]) -> None: ...

    def forward_backward(self, trainer_id: str, call: LossCall) -> LossResult: ...

    def forward(self, trainer_id: str, call: LossCall) -> LossResult: ...

    def score(
        self, trainer_id: str, units: Sequence[Unit], *, values: bool = False, reference: bool = False
    ) -> Scores: ...

    def optim_step(self, trainer_id: str, params: AdamParams, *, value_learning_rate: float) -> StepResult: ...

    def discard_gradients(self, trainer_id: str) -> None: ...

    def step_count(self, trainer_id: str) -> int: ...

    def version(self, trainer_id: str) -> str: ...

    def linear_paths(self, base_id: str) -> tuple[str, ...]: ...

    def snapshot(self, trainer_id: str) -> SnapshotInfo: ...

    def adapter_snapshot(self, base_id: str, adapter: SavedAdapter | None, *, seed: int) -> SnapshotInfo: ...

    def sample(
        self,
        snapshot_id: str,
        requests: Sequence[Request],
        *,
        stream: bool = False,
        progress: Callable[[Progress], None] | None = None,
        deterministic: bool = False,
        say: Callable[[str], None] = ...,
    ) -> Iterator[Delta | Finished]: ...

    def compute_logprobs(self, snapshot_id: str, tokens: Sequence[int]) -> list[float | None]: ...

    def export_state(self, trainer_id: str, *, ignore_gradients: bool = False) -> TrainerState: ...

    def import_state(
        self, trainer_id: str, state: TrainerState, *, ignore_gradients: bool = False, keep_cut: bool = False
    ) -> None: ...

    def state_bytes(self, trainer_id: str) -> int: ...

    def export_adapter(self, trainer_id: str) -> SavedAdapter: ...

    def release(self, kind: str, id: str) -> None: ...
