"""TrainingClient: gradients in, steps out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .adapter_folder import CONFIG, adapter_config, write_adapter
from .arguments import adam_fields, as_path, check_lengths, holds_rollouts, kind_of, plain_extra
from .checkpoint import dump_json, read_folder, write_folder
from .checks import at_least_0
from .custom_loss import evaluate, loss_weights, with_weights
from .data.datum import check_fields, validate_datums
from .data.prepare import Prepared, to_units
from .data.render import Renderer
from .engine.base import AdapterOptions, BaseInfo, LossCall, TrainerState, Unit
from .engine.local import LocalEngine
from .errors import CheckpointError, DatasetError, UsageError
from .keywords import known_keywords
from .losses import find_loss
from .losses.base import LossSpec, check_choice, check_options
from .notices import Notices
from .objectives import Policy, RolloutCall, RolloutMemory, grpo_call, policy_units, ppo_call
from .references import ReferenceCache
from .sampling import SamplingClient
from .types import AdamParams, LossResult, StepResult

_ROLLOUT_LOSSES = ("grpo", "ppo", "importance_sampling", "cispo", "dro")
_NO_DROPOUT = ("dpo", "grpo", "ppo", "importance_sampling", "cispo", "dro")


class TrainingClient:
    """One LoRA adapter on a frozen base. Made by `ServiceClient.create_lora_training_client`.

    A call that fails, however it fails, leaves weights, gradients, optimiser and randomness as before it.
    """

    def __init__(
        self,
        engine: LocalEngine,
        base: BaseInfo,
        trainer_id: str,
        *,
        options: AdapterOptions,
        max_length: int,
        overlong: str,
        say: Notices,
    ) -> None:
        self._close = weakref.finalize(self, engine.release, "trainer", trainer_id)
        self._engine, self._base, self._id = engine, base, trainer_id
        self._options, self._say = options, say
        self._max_length, self._overlong = max_length, overlong
        self._renderer = Renderer(base.tokenizer, stop_ids=base.stop_ids)
        self._trained_on: set[str] = set()
        self._memory = RolloutMemory()
        self._references = ReferenceCache()

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the base model."""
        return self._base.tokenizer

    @property
    def step(self) -> int:
        """Optimiser steps applied."""
        return self._engine.step_count(self._id)

    @property
    def base_model(self) -> str:
        return self._base.name

    @property
    def renderer(self) -> Renderer:
        """Rows -> tokens and which of them are trained, exactly as `forward_backward` does it."""
        return self._renderer

    @known_keywords
    def close(self) -> None:
        """Release the adapter, its gradients and moments."""
        self._close()

    @known_keywords
    def try_longest(self, lengths: Sequence[int], *, pairs: bool = False) -> None:
        """Find out now whether the longest documents fit, not when they come up hours later.

        Runs one micro-batch of made-up documents of these lengths and forgets it: weights, gradients, counters and
        randomness are as before. Where it runs out of memory the plan is stepped down, as in any call.

        Args:
            lengths: tokens a document, for a whole batch. pairs: each length is that of both documents of a pair.

        Raises:
            UsageError: a length that is no row of this client. DeviceMemoryError: they fit in no way.
        """
        check_lengths(lengths, self._max_length)
        self._engine.try_longest(self._id, [(n, n) if pairs else (n,) for n in lengths])

    # -- passes ------------------------------------------------------------------------------------------------------

    @known_keywords
    def forward_backward(
        self, batch: Any, rewards: Any = None, loss_fn: str | None = None, **options: Any
    ) -> LossResult:
        """Add the gradient of `batch` to what `optim_step` will apply.

        Args:
            batch: rows (`messages`; `prompt` + `completion`; `text`; alpaca; sharegpt; `prompt` + `chosen` + `rejected`), a dict of
                equal-length columns, strings, a Hugging Face tensor dict, `Datum`s, or completions and rollouts of a sampler.
            rewards: for completions: one each, nested like them or flat. A string here is the `loss_fn` (Tinker's order).
            loss_fn: "sft" (default), "dpo", "grpo", "ppo"; Tinker's "cross_entropy", "importance_sampling", "ppo" (on Datums),
                "cispo", "dro". `options` are that loss's; unknown ones raise.

        Returns:
            The loss: for "sft", "dpo", "grpo" and "ppo" on rollouts its mean over this call; for Tinker's losses the sum.

        Raises:
            UsageError, DatasetError: input that cannot be meant, naming the row and what to do. Nothing has changed then.
        """
        made, kinds = self._call(batch, rewards, loss_fn, options, fix=False)
        result = self._engine.forward_backward(self._id, made.call)
        self._memory.remember(made.old_logprobs, made.fixed)
        self._trained_on |= kinds
        return _with_metrics(result, made.metrics)

    @known_keywords
    def forward(self, batch: Any, rewards: Any = None, loss_fn: str | None = None, **options: Any) -> LossResult:
        """The loss without gradient. With `loss_fn="ppo"` and rewards it also fixes old values and advantages for the rollout:
        later `forward_backward` calls on any of its completions use them."""
        made, _ = self._call(batch, rewards, loss_fn, options, fix=True)
        result = self._engine.forward(self._id, made.call)
        self._memory.remember(made.old_logprobs, made.fixed)
        return _with_metrics(result, made.metrics)

    @known_keywords
    def forward_backward_custom(self, batch: Any, fn: Callable[..., Any], loss_fn: str = "cross_entropy") -> LossResult:
        """Train on a loss of your own: `fn(data, logprobs) -> (loss, metrics)`, any torch function of per-token log-probs.

        Args:
            fn: gets the `Datum`s and, aligned with each datum's positions, a list of float tensors (N,) that require grad; it
                returns a scalar tensor and a dict of numbers. It may be called once a batch, never inside the model's backward.
            loss_fn: how rows of `batch` are read: "cross_entropy" for single examples, "dpo" for preference rows (the data are
                then chosen, rejected, chosen, ...).

        The loss C is a sum with divisor 1, as written: its gradient is that of sum_i w_i log p_i with w = dC/dlog p.
        """
        import torch

        if not callable(fn):
            raise UsageError(f"fn must be a function of the data and their log-probs, got {type(fn).__name__}")
        check_choice({"loss_fn": loss_fn}, "loss_fn", ("cross_entropy", "sft", "dpo"))
        if self._options.dropout:
            raise UsageError("dropout makes the log-probs of a custom loss random; create the client with dropout=0")
        prepared = self._prepared(batch, "dpo" if loss_fn == "dpo" else "sft", negative_weights=True)
        data = prepared.datums
        plain = [(with_weights(d, None),) for d in data]
        scored = self._engine.forward(self._id, LossCall(plain, "cross_entropy"))
        logprobs = [torch.from_numpy(values).requires_grad_(True) for values in scored.logprobs]
        loss, metrics = evaluate(fn, data, logprobs)
        linear = [(with_weights(d, w),) for d, w in zip(data, loss_weights(loss, logprobs), strict=True)]
        self._engine.forward_backward(self._id, LossCall(linear, "linear"))
        self._trained_on |= prepared.kinds
        value, found = float(loss.detach()), [lp.detach().numpy() for lp in logprobs]
        metrics = {**metrics, **prepared.metrics}
        return LossResult(lambda: (value, metrics, found))

    @known_keywords
    def optim_step(
        self,
        params: AdamParams | Mapping[str, Any] | None = None,
        *,
        learning_rate: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        grad_clip_norm: float | None = None,
        value_learning_rate: float = 1e-3,
    ) -> StepResult:
        """Apply the accumulated gradient: divide, clip, AdamW, clear.

        Args:
            params: Tinker's `AdamParams`, or a mapping of its fields; keywords override it.
            value_learning_rate: of PPO's internal value head, where there is one.

        Raises:
            StateError: nothing was accumulated. UsageError: unknown fields, values out of range.
        """
        keywords = {
            "learning_rate": learning_rate,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_clip_norm": grad_clip_norm,
        }
        given = {name: value for name, value in keywords.items() if value is not None}
        chosen = AdamParams(**{**adam_fields(params), **given})
        at_least_0("value_learning_rate", value_learning_rate)
        return self._engine.optim_step(self._id, chosen, value_learning_rate=value_learning_rate)

    def _call(
        self, batch: Any, rewards: Any, loss_fn: str | None, options: Mapping[str, Any], *, fix: bool
    ) -> tuple[RolloutCall, frozenset[str]]:
        """The checked call, and the kinds of rows in it."""
        if isinstance(rewards, str):
            if loss_fn is not None:
                raise UsageError(
                    f"the second argument {rewards!r} is read as the loss_fn, and loss_fn={loss_fn!r} was given too"
                )
            rewards, loss_fn = None, rewards
        spec = find_loss("sft" if loss_fn is None else loss_fn)
        if self._options.dropout and spec.name in _NO_DROPOUT:
            raise UsageError(
                f"dropout={self._options.dropout} makes log-probs of {spec.name!r} random; create the client with dropout=0"
            )
        rollouts = holds_rollouts(batch)
        if rollouts and spec.name in _ROLLOUT_LOSSES:
            return self._rollout_call(batch, rewards, spec, options, fix=fix), frozenset()
        if rewards is not None:
            what = f"{spec.name!r} reads no rewards" if rollouts else "rewards belong to completions of a sampler"
            raise UsageError(
                f"rewards were given with a batch of {kind_of(batch)}, and {what}; name loss_fn='grpo', 'ppo' or "
                "'importance_sampling' with completions, or leave the rewards out"
            )
        if spec.name == "grpo":
            raise UsageError("grpo takes the groups that sample_batch(prompts, n=8) returns and their rewards")
        cached = spec.name == "dpo" and "cache_reference" in options
        if cached:
            check_choice(options, "cache_reference", (True, False))
        chosen, _ = check_options(spec, {k: v for k, v in options.items() if not (cached and k == "cache_reference")})
        prepared = self._prepared(batch, spec.name, spec=spec)
        units = prepared.units
        if cached and options["cache_reference"] and not chosen["reference_free"]:
            units = self._references.add(units, self._score)
        return RolloutCall(LossCall(units, spec.name, chosen), prepared.metrics), prepared.kinds

    def _rollout_call(
        self, batch: Any, rewards: Any, spec: LossSpec, options: Mapping[str, Any], *, fix: bool
    ) -> RolloutCall:
        policy = Policy(
            base=self._base.fingerprint[:8],
            version=self._engine.version(self._id),
            vocab_size=self._base.vocab_size,
            max_length=self._max_length,
            score=self._score,
            memory=self._memory,
            say=self._say,
            fp8=self._options.compute == "fp8",
        )
        if spec.name == "grpo":
            if rewards is None:
                raise UsageError("grpo needs rewards: forward_backward(completions, rewards, loss_fn='grpo')")
            return grpo_call(batch, rewards, options, policy)
        if spec.name == "ppo":
            return ppo_call(batch, rewards, options, policy, fix=fix)
        if rewards is None:
            raise UsageError(f"{spec.name} on completions takes their advantages as the second argument")
        chosen, _ = check_options(spec, options)
        return RolloutCall(LossCall(policy_units(batch, rewards, policy), spec.name, chosen))

    def _prepared(
        self, batch: Any, loss: str, *, spec: LossSpec | None = None, negative_weights: bool = False
    ) -> Prepared:
        prepared = to_units(
            batch,
            loss=loss,
            renderer=self._renderer,
            max_length=self._max_length,
            overlong=self._overlong,
            say=self._say,
        )
        check_fields(prepared.datums, spec)
        validate_datums(prepared.datums, self._base.vocab_size, negative_weights=negative_weights)
        if not prepared.units:
            raise DatasetError(
                f"nothing is left of this batch: {prepared.dropped} rows are longer than max_length={self._max_length}; "
                "raise max_length, or create the client with overlong='truncate_prompt'"
            )
        return prepared

    def _score(self, units: Sequence[Unit], *, values: bool = False, reference: bool = False):
        return self._engine.score(self._id, units, values=values, reference=reference)

    # -- weights -----------------------------------------------------------------------------------------------------

    @known_keywords
    def save_weights_and_get_sampling_client(self) -> SamplingClient:
        """A sampler of the weights as they are now; training on leaves its answers unchanged."""
        snapshot = self._engine.snapshot(self._id)
        return SamplingClient(
            self._engine, snapshot, self._base, self._renderer, trained_on=frozenset(self._trained_on), say=self._say
        )

    @known_keywords
    def save_adapter(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the adapter as a folder that plain PEFT loads, with tokenizer, chat template and a card."""
        path = as_path(path, "where to save")
        adapter = self._engine.export_adapter(self._id)
        return write_adapter(
            path,
            adapter,
            base_name=self._base.name,
            linear_paths=self._engine.linear_paths(self._base.id),
            tokenizer=self._base.tokenizer,
            chat_template=self._renderer.template,
            meta=self._meta(self.step),
            overwrite=overwrite,
        )

    @property
    def state_bytes(self) -> int:
        """About the bytes of a saved state; a saved adapter takes a third of it."""
        return self._engine.state_bytes(self._id)

    @known_keywords
    def save_state(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        discard_gradients: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write everything training continues from: weights, moments, step, randomness. Whole or not at all.

        Args:
            discard_gradients: drop gradients that no `optim_step` has applied, once the state is written; without it
                they make this raise.
            extra: JSON values to keep with it, such as a data position; `load_state` returns them.
        """
        path = as_path(path, "where to save")
        state = self._engine.export_state(self._id, ignore_gradients=discard_gradients)
        adapter = self._engine.export_adapter(self._id)
        config = adapter_config(
            adapter, base_name=self._base.name, linear_paths=self._engine.linear_paths(self._base.id)
        )
        meta = {"kind": "state", **self._meta(state.meta["step"]), "state": state.meta, "extra": plain_extra(extra)}
        written = write_folder(path, {**state.files, CONFIG: dump_json(config)}, meta=meta, overwrite=overwrite)
        if discard_gradients:
            self._engine.discard_gradients(self._id)
        return written

    @known_keywords
    def load_state(self, path: str | Path, *, discard_gradients: bool = False) -> dict[str, Any]:
        """Continue from what `save_state` wrote; returns its `extra`.

        Args:
            discard_gradients: drop gradients that no `optim_step` has applied; without it they make this raise.

        Raises:
            CheckpointError: damaged, or saved by a trainer with another base model or geometry; nothing has changed then.
        """
        keep_cut = self._options.micro_batch_tokens is not None
        return self._load_state(path, discard_gradients=discard_gradients, keep_cut=keep_cut)

    def _load_state(self, path: str | Path, *, discard_gradients: bool = False, keep_cut: bool) -> dict[str, Any]:
        """`keep_cut`: compute in this client's micro-batches, not in the saved ones; in bf16 another cut rounds differently."""
        checkpoint = read_folder(as_path(path, "a state to load"))
        if checkpoint.meta.get("kind") != "state":
            raise CheckpointError(f"{path} is a saved {checkpoint.meta.get('kind', 'folder')}, not a training state")
        files = {name: checkpoint.bytes(name) for name in checkpoint.manifest if name.endswith(".safetensors")}
        state = TrainerState(files, checkpoint.meta["state"])
        self._engine.import_state(self._id, state, ignore_gradients=discard_gradients, keep_cut=keep_cut)
        self._trained_on = set(checkpoint.meta["trained_on"])
        self._options = replace(self._options, seed=state.meta["seed"])
        self._memory, self._references = RolloutMemory(), ReferenceCache()
        return checkpoint.meta["extra"]

    def _meta(self, step: int) -> dict[str, Any]:
        options = self._options
        client = {
            "base_model": self._base.name,
            "rank": options.rank,
            "alpha": options.alpha,
            "quantize": self._base.quantize,
            "target_modules": options.targets if isinstance(options.targets, str) else list(options.targets),
            "train_unembed": options.train_unembed,
            "dropout": options.dropout,
            "seed": options.seed,
            "dtype": self._base.dtype,
            "max_length": self._max_length,
            "overlong": self._overlong,
            "micro_batch_tokens": options.micro_batch_tokens,
            "compute": options.compute,
        }
        return {
            "client": client,
            "step": step,
            "trained_on": sorted(self._trained_on),
            "base_fingerprint": self._base.fingerprint,
        }


def _with_metrics(result: LossResult, extra: Mapping[str, float]) -> LossResult:
    if not extra:
        return result
    return LossResult(lambda: (float(result), {**extra, **result.metrics}, result.logprobs))
