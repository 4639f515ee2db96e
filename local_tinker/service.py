"""ServiceClient: finds the hardware, names the models, makes the other clients."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import as_path
from .checkpoint import read_folder
from .checks import positive, share, whole
from .errors import CheckpointError, UsageError
from .hardware import Hardware, detect
from .keywords import known_keywords
from .notices import Notices

if TYPE_CHECKING:
    from .engine.base import AdapterOptions, BaseInfo, SavedAdapter
    from .engine.local import LocalEngine
    from .sampling import SamplingClient
    from .training import TrainingClient

# One engine a device in this process, shared by every ServiceClient, so that running a notebook cell again loads nothing
# twice. The one module global of the package.
_ENGINES: dict[str, LocalEngine] = {}
_ENGINES_LOCK = threading.Lock()
OVERLONG = ("drop", "truncate_prompt", "error")
MAX_SEED = 2**63 - 1


class ServiceClient:
    """The way in. Making one finds the hardware and loads nothing.

    Args:
        device: "cuda" or "cpu"; None takes the GPU when there is one.
        quiet: keep notices (fallbacks, dropped rows, decisions) to itself instead of saying each once on stderr.
        engine: one of your own for this device, instead of the one that this process's clients share.
        deterministic: on a GPU, only kernels whose results repeat bit for bit, for this process from here on (it turns on
            `torch.use_deterministic_algorithms`); they are slower. On a CPU results repeat in any case.
    """

    @known_keywords
    def __init__(
        self,
        *,
        device: str | None = None,
        quiet: bool = False,
        engine: LocalEngine | None = None,
        deterministic: bool = False,
    ) -> None:
        if device not in (None, "cuda", "cpu"):
            raise UsageError(f"device must be 'cuda', 'cpu' or None, got {device!r}")
        if engine is not None:
            if not hasattr(engine, "load_base"):
                raise UsageError(f"engine must be a LocalEngine, or None for the one of this process; got {engine!r}")
            if device not in (None, engine.device.type):
                raise UsageError(f"the engine given owns {engine.device.type!r} and device={device!r} was asked for")
            device = engine.device.type
        self.hardware: Hardware = detect(device)
        if device == "cuda" and self.hardware.kind != "cuda":
            raise UsageError("device='cuda' was asked for and no CUDA device was found; run `local-tinker doctor`")
        self._device = device or self.hardware.kind
        self._own = engine
        self._say = Notices(lambda line: None) if quiet else Notices()
        if deterministic and self._device == "cuda":
            from .engine.determinism import make_deterministic

            make_deterministic(say=self._say)

    @known_keywords
    def models(self) -> list[dict[str, Any]]:
        """One dict a known model: name, parameters, quantisation, planned peak, status on this hardware, whether on disk."""
        from .engine.fit import model_table

        return model_table(self.hardware)

    @known_keywords
    def create_lora_training_client(
        self,
        base_model: str,
        *,
        rank: int = 32,
        alpha: float = 32.0,
        quantize: str | None = "4bit",
        target_modules: str | Sequence[str] = "all-linear",
        train_unembed: bool = False,
        dropout: float = 0.0,
        seed: int = 42,
        dtype: str | None = None,
        max_length: int | None = None,
        overlong: str = "drop",
        adapter: str | Path | None = None,
        micro_batch_tokens: int | None = None,
        compute: str | None = None,
    ) -> TrainingClient:
        """A LoRA adapter on a frozen base, ready to train.

        Args:
            base_model: a hub id, a folder or a catalogue alias (`models()` lists them).
            rank, alpha: the update is (alpha / rank) B A; alpha 32 at every rank is Tinker's constant.
            quantize: "4bit" (NF4, double quantised), "8bit" (row-wise int8) or None, for the frozen base.
            target_modules: "all-linear", or module names such as ["q_proj", "v_proj"].
            train_unembed: also adapt the output head.
            dropout: on the adapter's input; refused outside SFT.
            seed: of the adapter's initial values, dropout and unseeded sampling.
            dtype: compute type; None is bfloat16 where the hardware has it, else float32.
            max_length: longest datum in tokens; None is the model's context.
            overlong: what happens to longer rows: "drop" (counted), "truncate_prompt" or "error".
            adapter: start from this saved adapter instead of a fresh one; its weights are then the reference of DPO and
                KL terms. Its rank, alpha and modules are used.
            micro_batch_tokens: tokens computed at a time; None lets the memory plan decide. Changes speed, not results.
            compute: None multiplies in `dtype`; "fp8" multiplies the frozen base's weights in 8-bit floats while training,
                which is faster and an approximation. Adapters, attention, head and sampling stay in `dtype`, so a sampler's
                log-probs are then not exactly the trainer's.
        """
        from .training import TrainingClient

        _check_name(base_model)
        options = _options(rank, alpha, target_modules, train_unembed, dropout, seed, micro_batch_tokens, compute)
        start = None if adapter is None else self._adapter(adapter)
        _check_lengths(max_length, overlong)
        engine, base = self._load(base_model, quantize=quantize, dtype=dtype)
        if max_length is not None and max_length > base.max_positions:
            raise UsageError(f"max_length={max_length} is more than the model's context of {base.max_positions}")
        if start is not None:
            _check_base(*start[1:], base, adapter)
            options = _started(options, start[0], engine.linear_paths(base.id))
        trainer_id = engine.create_trainer(base.id, options, start=None if start is None else start[0], say=self._say)
        return TrainingClient(
            engine,
            base,
            trainer_id,
            options=options,
            max_length=max_length or base.max_positions,
            overlong=overlong,
            say=self._say,
        )

    @known_keywords
    def create_training_client_from_state(
        self, path: str | Path, *, compute: str | None = "as saved"
    ) -> TrainingClient:
        """Continue from what `save_state` wrote, in this process or a fresh one: weights, moments, step and randomness.

        Args:
            compute: "as saved" is what the state was trained with; None continues in `dtype`, on a card without 8-bit floats.

        Raises:
            CheckpointError: a damaged folder, or a base model that is not the one it was trained on.
        """
        checkpoint = read_folder(as_path(path, "a state to continue"))
        meta = checkpoint.meta
        if meta.get("kind") != "state":
            raise CheckpointError(
                f"{path} is a saved {meta.get('kind', 'folder')}, not a training state; use what save_state wrote"
            )
        client = meta["client"] if compute == "as saved" else {**meta["client"], "compute": compute}
        trainer = self.create_lora_training_client(**client)
        trainer._load_state(path, keep_cut=False)
        return trainer

    @known_keywords
    def create_sampling_client(
        self,
        base_model: str | Path,
        *,
        quantize: str | None = "as trained",
        dtype: str | None = None,
        seed: int = 42,
    ) -> SamplingClient:
        """Sample from a model, an adapter folder or a saved state.

        Args:
            base_model: a hub id, folder or alias; or a folder that `save_adapter` or `save_state` (or PEFT) wrote, whose
                base is then loaded too.
            quantize: "as trained" is what an adapter was trained with, and "4bit" for a model alone.
            seed: of unseeded requests.
        """
        from .data.render import Renderer
        from .sampling import SamplingClient

        _check_name(base_model)
        whole("seed", seed, least=0, most=MAX_SEED)
        adapter, trained_on = None, frozenset()
        if (Path(base_model) / "adapter_model.safetensors").is_file():
            adapter, config, meta = self._adapter(base_model)
            base_model, trained_on = config["base_model_name_or_path"], frozenset(meta.get("trained_on", ()))
            saved = meta.get("client", {})
            quantize = saved.get("quantize", "4bit") if quantize == "as trained" else quantize
            dtype = dtype or saved.get("dtype")
        engine, base = self._load(
            str(base_model), quantize="4bit" if quantize == "as trained" else quantize, dtype=dtype
        )
        if adapter is not None:
            _check_base(config, meta, base, base_model)
        renderer = Renderer(base.tokenizer, stop_ids=base.stop_ids)
        snapshot = engine.adapter_snapshot(base.id, adapter, seed=seed)
        return SamplingClient(engine, snapshot, base, renderer, trained_on=trained_on, say=self._say)

    @known_keywords
    def close(self) -> None:
        """Release every model of this client's engine, by default the process's for the device. Clients made from it stop
        working."""
        if self._own is not None:
            self._own.release_all()
            return
        with _ENGINES_LOCK:
            engine = _ENGINES.pop(self._device, None)
        if engine is not None:
            engine.release_all()

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adapter(self, path: str | Path) -> tuple[SavedAdapter, dict, dict]:
        from .adapter_folder import read_adapter

        return read_adapter(as_path(path, "an adapter to start from"))

    def _load(self, name: str, *, quantize: str | None, dtype: str | None) -> tuple[LocalEngine, BaseInfo]:
        from .engine.local import LocalEngine
        from .model.catalogue import resolve

        source = resolve(str(name), say=self._say)
        with _ENGINES_LOCK:
            engine = self._own or _ENGINES.setdefault(self._device, LocalEngine(self._device))
        chosen = dtype if dtype is not None else ("bfloat16" if self.hardware.bf16 else "float32")
        base = engine.load_base(str(source.path), name=source.name, quantize=quantize, dtype=chosen, say=self._say)
        return engine, base


def _check_base(config: dict, meta: dict, base: BaseInfo, path: str | Path) -> None:
    """The adapter was made for these weights: by their fingerprint where it is known, else by the base's name."""
    made_for = config.get("base_model_name_or_path")
    known = meta.get("base_fingerprint")
    if known is not None and known != base.fingerprint:
        raise CheckpointError(
            f"the adapter {path} was made for {made_for} with other weights (fingerprint {known[:12]}, here {base.fingerprint[:12]})"
        )
    if known is None and made_for and Path(made_for).name != Path(base.name).name:
        raise CheckpointError(f"the adapter {path} was made for {made_for}, and the base model is {base.name}")


def _started(options: AdapterOptions, adapter: SavedAdapter, linear_paths: tuple[str, ...]) -> AdapterOptions:
    """The options of a trainer that starts from a saved adapter: that adapter's geometry."""
    for name, default in (("rank", 32), ("alpha", 32.0)):
        asked, saved = getattr(options, name), getattr(adapter, name)
        if asked not in (default, saved):
            raise UsageError(f"{name}={asked:g} was asked for and the adapter has {name}={saved:g}; leave it out")
    inner = tuple(path for path in adapter.paths if path in set(linear_paths))
    return replace(
        options,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=inner,
        train_unembed=len(inner) < len(adapter.paths),
    )


def _options(
    rank: Any,
    alpha: Any,
    targets: Any,
    train_unembed: bool,
    dropout: Any,
    seed: Any,
    micro_batch_tokens: Any,
    compute: Any,
) -> AdapterOptions:
    """The user's arguments, checked."""
    from .engine.base import AdapterOptions
    from .engine.footprint import COMPUTE

    if compute not in COMPUTE:
        raise UsageError(f'compute must be None or "fp8", got {compute!r}')
    return AdapterOptions(
        rank=whole("rank", rank),
        alpha=positive("alpha", alpha),
        targets=_targets(targets, train_unembed),
        train_unembed=train_unembed,
        dropout=share("dropout", dropout),
        seed=whole("seed", seed, least=0, most=MAX_SEED),
        micro_batch_tokens=None if micro_batch_tokens is None else whole("micro_batch_tokens", micro_batch_tokens),
        compute=compute,
    )


def _check_lengths(max_length: Any, overlong: str) -> None:
    if overlong not in OVERLONG:
        raise UsageError(f"overlong must be one of {', '.join(map(repr, OVERLONG))}, got {overlong!r}")
    if max_length is not None:
        whole("max_length", max_length, least=2)


def _check_name(base_model: Any) -> None:
    if not isinstance(base_model, (str, os.PathLike)):
        raise UsageError(f"base_model must be a hub id, a folder or an alias that models() lists, got {base_model!r}")


def _targets(targets: Any, train_unembed: bool) -> str | tuple[str, ...]:
    """Module names. None at all is meant only where the output head is adapted."""
    if isinstance(targets, str):
        return targets
    names = tuple(targets) if isinstance(targets, Iterable) else (None,)
    if not all(isinstance(name, str) for name in names) or not (names or train_unembed):
        raise UsageError(
            f'target_modules must be "all-linear" or module names such as ["q_proj", "v_proj"], got {targets!r}'
        )
    return names
