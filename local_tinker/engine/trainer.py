"""One adapter in training: its values, gradients, moments and counters, and the passes over them.

Shapes: P parameters of the adapter, H hidden.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import StateError
from ..losses import LOSSES
from ..losses.base import LossSpec, finish_metrics
from ..model.adapter import Adapter, AdapterSpec
from ..model.load import LoadedModel
from ..model.lora import LoraDropout
from ..types import AdamParams, LossResult, StepResult
from .base import LossCall, Scores, Unit
from .interrupts import finish_first
from .optimiser import SUMS, FlatAdamW, GradientWindow
from .planning import Budget
from .step import Outcome, Weights, cut, loss_terms, micro_batch, per_datum, record, run_forward

VALUE_LEARNING_RATE = (
    1e-3  # of the value head, when a step names none; its features do not start at zero, LoRA's B does
)


class Trainer:
    """The trainable state on one frozen base.

    Attributes:
        uid: survives saving and loading; with `step` it names a version of the weights.
        step: optimiser steps applied.
        calls: forward_backward calls since the start, which seed dropout.
    """

    def __init__(self, model: LoadedModel, spec: AdapterSpec, budget: Budget) -> None:
        self.model, self.spec, self.budget = model, spec, budget
        self.adapter = Adapter(spec, dtype=model.dtype, device=model.device)
        self.adapter.initialise()
        self.optimiser = FlatAdamW(self.adapter.master)
        self.window = GradientWindow(spec.numel, self.adapter.master.dtype, model.device)
        self.value_head: Tensor | None = None  # (H + 1,) weight and bias
        self.value_optimiser: FlatAdamW | None = None
        self.value_window: GradientWindow | None = None
        self.reference: Tensor | None = None  # compute copy the reference runs with; None: scale 0
        self.uid = uuid.uuid4().hex[:12]
        self.calls = 0

    @property
    def step(self) -> int:
        return int(self.optimiser.count.item())

    @property
    def version(self) -> str:
        """Names these weights: base, adapter, step."""
        return f"{self.model.fingerprint[:8]}/{self.uid}/{self.step}"

    # -- passes ------------------------------------------------------------------------------------------------------

    def forward_backward(self, call: LossCall) -> LossResult:
        """Add the call's gradient of sums to the window; a failure restores the window."""
        spec = LOSSES[call.loss]
        if "values" in spec.needs(call.options):
            self.ensure_value_head()
        windows = [w for w in (self.window, self.value_window) if w is not None]
        backups = [window.backup() for window in windows]
        try:
            outcome = self._backward(call, spec)
            self.window.add_weight(_normaliser(spec), outcome.weight)
        except BaseException:
            for window, backup in zip(windows, backups, strict=True):
                window.restore(backup)
            raise
        return _result(outcome, spec, call)

    def _backward(self, call: LossCall, spec: LossSpec) -> Outcome:
        key, needs, outcome = _normaliser(spec), spec.needs(call.options), Outcome()
        pairs, leaves = self.adapter.leaves()
        weights = Weights(pairs, self.spec.scale, self.model.head_path)
        head = self.value_head.detach().requires_grad_(True) if "values" in needs else None
        targets = [t for pair in self.adapter.views(self.window.buffer(key)).values() for t in pair]
        for number, chosen in enumerate(cut(call.units, budget=self.budget.micro_batch_tokens)):
            micro = micro_batch(call.units, chosen, spec, device=self.model.device)
            out = run_forward(
                self.model,
                micro,
                weights,
                needs=needs,
                reference=self.reference_weights() if "reference" in needs else None,
                value_head=head,
                recompute=self.budget.recompute,
                dropout=self._dropout(number),
                head_rows=self.budget.head_rows,
            )
            terms = loss_terms(spec, out, micro, call.options)
            wanted = leaves if head is None else [*leaves, head]
            grads = torch.autograd.grad(terms.total, wanted, allow_unused=True)
            for target, grad in zip(targets, grads[: len(leaves)], strict=True):
                if grad is not None:
                    target += grad
            if head is not None and grads[-1] is not None:
                self.value_window.buffer(key).add_(grads[-1])
            record(outcome, micro, out, terms)
        self.calls += 1
        self.window.calls += 1
        if head is not None:
            self.value_window.calls += 1
            self.value_window.add_weight(key, outcome.weight)
        return outcome

    @torch.no_grad()
    def forward(self, call: LossCall) -> LossResult:
        """The loss without gradient; dropout is off."""
        spec = LOSSES[call.loss]
        needs, outcome = spec.needs(call.options), Outcome()
        if "values" in needs:
            self.ensure_value_head()
        for micro, out in self._run(call.units, spec, needs):
            record(outcome, micro, out, loss_terms(spec, out, micro, call.options))
        return _result(outcome, spec, call)

    @torch.no_grad()
    def score(self, units: Sequence[Unit], *, values: bool, reference: bool) -> Scores:
        """Log-probs of every weighted target, and values and reference log-probs when asked for."""
        if values:
            self.ensure_value_head()
        needs = frozenset(name for name, on in (("values", values), ("reference", reference)) if on)
        outcome, count = Outcome(), sum(len(unit) for unit in units)
        for micro, out in self._run(units, LOSSES["sft"], needs):
            record(outcome, micro, out, None)
        return Scores(
            logprobs=per_datum(outcome.logprobs, count),
            values=per_datum(outcome.values, count) if values else None,
            reference_logprobs=per_datum(outcome.reference, count) if reference else None,
        )

    def _run(self, units: Sequence[Unit], spec: LossSpec, needs: frozenset[str]) -> Iterator:
        weights = Weights(self.adapter.views(self.adapter.compute), self.spec.scale, self.model.head_path)
        reference = self.reference_weights() if "reference" in needs else None
        for chosen in cut(units, budget=self.budget.micro_batch_tokens):
            micro = micro_batch(units, chosen, spec, device=self.model.device)
            yield (
                micro,
                run_forward(
                    self.model,
                    micro,
                    weights,
                    needs=needs,
                    reference=reference,
                    value_head=self.value_head,
                    head_rows=self.budget.head_rows,
                ),
            )

    def reference_weights(self) -> Weights:
        """The base with this adapter's tensors at scale 0, so the same kernels run; or the adapter training started from."""
        flat = self.adapter.compute if self.reference is None else self.reference
        scale = 0.0 if self.reference is None else self.spec.scale
        return Weights(self.adapter.views(flat), scale, self.model.head_path)

    def _dropout(self, number: int) -> LoraDropout | None:
        if self.spec.dropout == 0.0:
            return None
        return LoraDropout(self.spec.dropout, hash((self.spec.seed, self.calls, number)) & 0x7FFFFFFF)

    def ensure_value_head(self) -> None:
        """Zero-initialised: values start at 0 and leave the policy's first gradients alone."""
        if self.value_head is None:
            size = self.model.head.weight.shape[1] + 1
            self.value_head = torch.zeros(size, dtype=self.adapter.master.dtype, device=self.model.device)
            self.value_optimiser = FlatAdamW(self.value_head)
            self.value_window = GradientWindow(size, self.value_head.dtype, self.model.device)

    # -- the optimiser -----------------------------------------------------------------------------------------------

    def optim_step(self, params: AdamParams, *, value_learning_rate: float = VALUE_LEARNING_RATE) -> StepResult:
        """Divide the window's sums, clip, AdamW, clear. Interrupts wait until it is whole."""
        if self.window.empty:
            raise StateError("optim_step with nothing accumulated: call forward_backward first")
        with torch.no_grad(), finish_first():
            gradient = self.window.gradient()
            head_gradient = (
                self.value_window.gradient() if self.value_window is not None and not self.value_window.empty else None
            )
            norm = torch.linalg.vector_norm(gradient)
            if head_gradient is not None:
                norm = torch.hypot(norm, torch.linalg.vector_norm(head_gradient))
            norm, skipped = self.optimiser.step(gradient, params, norm=norm)
            if head_gradient is not None:
                self.value_optimiser.step(head_gradient, _with_rate(params, value_learning_rate), norm=norm)
                self.value_window.clear()
            self.adapter.refresh()
            self.window.clear()
            count = self.optimiser.count.clone()
        return StepResult(lambda: _read_step(norm, skipped, count))

    def discard_gradients(self) -> None:
        self.window.clear()
        if self.value_window is not None:
            self.value_window.clear()


def _with_rate(params: AdamParams, learning_rate: float) -> AdamParams:
    fields = {name: getattr(params, name) for name in AdamParams.__dataclass_fields__}
    return AdamParams(**{**fields, "learning_rate": learning_rate})


def _read_step(norm: Tensor, skipped: Tensor, count: Tensor) -> tuple[float, bool, int]:
    values = torch.stack([norm.double(), skipped.double(), count.double()]).tolist()
    return values[0], bool(values[1]), int(values[2])


def _normaliser(spec: LossSpec) -> str:
    """Losses with one divisor share a buffer: sums with divisor 1 all do, others each have their own."""
    return spec.name if spec.normaliser == "weight" else SUMS


def _result(outcome: Outcome, spec: LossSpec, call: LossCall) -> LossResult:
    count = sum(len(unit) for unit in call.units)

    def read():
        total = float(outcome.total)
        value = total / float(outcome.weight) if spec.normaliser == "weight" else total
        return value, finish_metrics(outcome.metrics), per_datum(outcome.logprobs, count)

    return LossResult(read)
