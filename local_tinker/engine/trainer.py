"""One adapter in training: its values, gradients, moments and counters, and the passes over them.

Shapes: P parameters of the adapter, H hidden.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.pack import pack
from ..errors import DeviceMemoryError, StateError
from ..losses import LOSSES
from ..losses.base import LossInputs, LossSpec, finish_metrics
from ..model.adapter import Adapter, AdapterSpec
from ..model.loaded import LoadedModel
from ..model.lora import LoraDropout
from ..out_of_memory import until_it_fits
from ..sampler.sequence import derive_seed
from ..types import AdamParams, LossResult, StepResult
from .base import LossCall, Scores, Unit
from .footprint import Choice
from .interrupts import finish_first
from .micro_batch import MicroBatch, blank, cut, micro_batch, shared_heads
from .optimiser import SUMS, FlatAdamW, GradientWindow, WindowBackup, clip
from .planning import Budget
from .step import Gradients, Outcome, Weights, loss_terms, per_datum, record, run_forward

T = TypeVar("T")


@dataclass(eq=False)
class ValueHead:
    """PPO's critic: weight and bias on the final hidden states, (H + 1,), fp32, with its own gradient and moments.

    It starts at zero: values are then 0 and the policy's first gradients are its own.
    """

    weights: Tensor
    optimiser: FlatAdamW
    window: GradientWindow

    @classmethod
    def create(cls, hidden: int, *, dtype: torch.dtype, device: torch.device) -> ValueHead:
        weights = torch.zeros(hidden + 1, dtype=dtype, device=device)
        return cls(weights, FlatAdamW(weights), GradientWindow(hidden + 1, dtype, device))


class Trainer:
    """The trainable state on one frozen base.

    Attributes:
        uid: survives saving and loading; with the step it names a version of the weights. Steps taken after a load count
            under `branch`, a new uid, since the original may have gone on too.
        step: optimiser steps applied.
        calls: forward_backward calls since the start, which seed dropout.

    Args:
        spare: lets go of memory that nobody uses when there is too little; whether there was some.
    """

    def __init__(
        self,
        model: LoadedModel,
        spec: AdapterSpec,
        budget: Budget,
        *,
        say: Callable[[str], None] = lambda line: None,
        spare: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.spec, self.budget, self._say, self._spare = model, spec, budget, say, spare
        self.adapter = Adapter(spec, dtype=model.dtype, device=model.device)
        self.adapter.initialise()
        self.optimiser = FlatAdamW(self.adapter.master)
        self.window = GradientWindow(spec.numel, self.adapter.master.dtype, model.device)
        self.value: ValueHead | None = None
        self.reference: Tensor | None = None  # compute copy the reference runs with; None: scale 0
        self.uid = self.branch = uuid.uuid4().hex[:12]
        self.loaded_step, self.calls = 0, 0

    @property
    def step(self) -> int:
        return int(self.optimiser.count.item())

    @property
    def lineage(self) -> str:
        """The uid under which the present step counts."""
        return self.uid if self.step <= self.loaded_step else self.branch

    @property
    def version(self) -> str:
        """Names these weights: base, adapter, step."""
        return f"{self.model.fingerprint[:8]}/{self.lineage}/{self.step}"

    # -- memory ------------------------------------------------------------------------------------------------------

    def make_room(self) -> None:
        """Let the device be as the plan says before the first call."""
        self._with_room(0, lambda: None)

    def _with_room(self, longest: int, attempt: Callable[[], T]) -> T:
        """Run `attempt` by the plan, and again by a smaller one as long as it runs out of memory.

        An attempt that raises leaves everything as it was, and dropout is seeded by call and datum, so the result is the
        one of a run that had the smaller plan from the start.

        Args:
            longest: tokens of the longest unit, which no plan can cut.
        """

        def run() -> T:
            self._apply(self.budget.choice_for(longest))
            return attempt()

        def step_down() -> bool:
            if self._spare():
                self._say("out of memory; the sampler's idle cache was let go and the call is repeated")
                return True
            smaller = self.budget.smaller(longest)
            if smaller is None:
                return False
            self.budget = smaller
            self._say(f"out of memory; the call is repeated, and from here on there are {smaller.describe()}")
            return True

        before = self.budget
        try:
            return until_it_fits(run, step_down=step_down)
        except DeviceMemoryError:
            self.budget = before  # what fits nowhere says nothing about all else
            raise

    def _apply(self, choice: Choice) -> None:
        """Weights held dequantised and the place of the moments; does nothing where they are so already."""
        if self.budget.settings.in_place or choice.resident_layers:
            layers = None if self.budget.settings.in_place else choice.resident_layers
            # a dense base moves into the projections' own layout
            self.model.hold_weights(layers, rank=self.spec.rank, fp8=self.budget.settings.fp8)
        else:
            self.model.release_weights()
        self.optimiser.park(choice.parked_moments)

    def try_longest(self, lengths: Sequence[Sequence[int]]) -> None:
        """Run a step's first micro-batch over made-up documents this long and forget it, so that a plan that does not fit
        shows now. Nothing is trained; gradients and counters are as before.

        Args:
            lengths: tokens of the documents of each unit (one, or a preference pair).
        """

        def attempt() -> None:
            first, *_ = pack(lengths, budget=self.budget.micro_batch_tokens)
            units = [tuple(blank(tokens) for tokens in lengths[unit]) for unit in first]
            backup, calls = self.window.backup(), self.calls
            try:
                float(self._forward_backward(LossCall(units, "sft")))  # reading it waits for the device
            finally:
                self.window.restore(backup)
                self.calls = calls

        longest = max(map(sum, lengths), default=0)
        if longest:
            self._with_room(longest, attempt)

    # -- passes ------------------------------------------------------------------------------------------------------

    def forward_backward(self, call: LossCall) -> LossResult:
        """Add the call's gradient of sums to the window; a failure restores everything."""
        return self._with_room(_longest(call.units), lambda: self._forward_backward(call))

    def _forward_backward(self, call: LossCall) -> LossResult:
        spec = LOSSES[call.loss]
        value, calls = self.value, self.calls
        windows = [self.window] if value is None else [self.window, value.window]
        backups = [window.backup() for window in windows]
        try:
            if "values" in spec.needs(call.options):
                self.ensure_value_head()
            outcome = self._backward(call, spec, backups)
        except BaseException:
            with finish_first():
                for window, backup in zip(windows, backups, strict=True):
                    window.restore(backup)
                self.value, self.calls = value, calls
            raise
        return _result(outcome, spec, call)

    def _backward(self, call: LossCall, spec: LossSpec, backups: Sequence[WindowBackup]) -> Outcome:
        key, needs, outcome = _normaliser(spec, call.options), spec.needs(call.options), Outcome()
        weights = self._weights(self.adapter.compute, self.spec.scale)
        value = self.value if "values" in needs else None
        gradients = Gradients(
            self.adapter.views(self.window.buffer(key)), None if value is None else value.window.buffer(key)
        )
        reference = self.reference_weights() if "reference" in needs else None
        for micro in self._micro_batches(call.units, spec, share=self.spec.dropout == 0.0):
            out = run_forward(
                self.model,
                micro,
                weights,
                needs=needs,
                reference=reference,
                value_head=None if value is None else value.weights,
                gradients=gradients,
                choice=self.budget.choice_for(len(micro.tokens)),
                dropout=self._dropout(micro),
            )
            for backup in backups:
                backup.wait()
            terms = loss_terms(spec, out, micro, call.options)
            terms.total.backward()
            record(outcome, micro, out, terms)
            del out, terms  # their graph holds the embedded tokens, beside the next micro-batch
        self.calls += 1
        for window in [self.window] if value is None else [self.window, value.window]:
            window.add_weight(key, outcome.weight)
            window.calls += 1
        return outcome

    def forward(self, call: LossCall) -> LossResult:
        """The loss without gradient; dropout is off."""
        return self._with_room(_longest(call.units), lambda: self._forward(call))

    @torch.no_grad()
    def _forward(self, call: LossCall) -> LossResult:
        spec = LOSSES[call.loss]
        outcome = Outcome()
        for micro, out in self._run(call.units, spec, spec.needs(call.options)):
            record(outcome, micro, out, loss_terms(spec, out, micro, call.options))
        return _result(outcome, spec, call)

    def score(self, units: Sequence[Unit], *, values: bool, reference: bool) -> Scores:
        """Log-probs of every weighted target, and values and reference log-probs when asked for."""
        return self._with_room(_longest(units), lambda: self._score(units, values=values, reference=reference))

    @torch.no_grad()
    def _score(self, units: Sequence[Unit], *, values: bool, reference: bool) -> Scores:
        needs = frozenset(name for name, on in (("values", values), ("reference", reference)) if on)
        outcome, count = Outcome(), sum(len(unit) for unit in units)
        for micro, out in self._run(units, LOSSES["sft"], needs):
            record(outcome, micro, out, None)
        return Scores(
            logprobs=per_datum(outcome.logprobs, count),
            values=per_datum(outcome.values, count) if values else None,
            reference_logprobs=per_datum(outcome.reference, count) if reference else None,
        )

    def _run(
        self, units: Sequence[Unit], spec: LossSpec, needs: frozenset[str]
    ) -> Iterator[tuple[MicroBatch, LossInputs]]:
        weights = self._weights(self.adapter.compute, self.spec.scale)
        reference = self.reference_weights() if "reference" in needs else None
        value = self.value or self.new_value_head() if "values" in needs else None
        for micro in self._micro_batches(units, spec, share=True):
            yield (
                micro,
                run_forward(
                    self.model,
                    micro,
                    weights,
                    needs=needs,
                    reference=reference,
                    value_head=None if value is None else value.weights,
                    choice=self.budget.choice_for(len(micro.tokens)),
                ),
            )

    def _micro_batches(self, units: Sequence[Unit], spec: LossSpec, *, share: bool) -> Iterator[MicroBatch]:
        """Heads are shared where the road can, and where no dropout draws a mask for each datum."""
        longest = max((datum.length for unit in units for datum in unit), default=0)
        # Where a text's length decides how it is rotated, a longer one cannot share with others.
        share = share and self.model.fast is not None and longest <= self.model.cached_positions
        heads = shared_heads(units, spec) if share else None
        for chosen in cut(units, budget=self.budget.micro_batch_tokens, heads=heads):
            yield micro_batch(units, chosen, spec, device=self.model.device, heads=heads)

    def reference_weights(self) -> Weights:
        """The base with this adapter's tensors at scale 0, so the same kernels run; or the adapter training started from."""
        flat = self.adapter.compute if self.reference is None else self.reference
        scale = 0.0 if self.reference is None else self.spec.scale
        return self._weights(flat, scale)

    def _weights(self, flat: Tensor, scale: float) -> Weights:
        return Weights(self.adapter.views(flat), scale, self.model.head_path, self.budget.settings.fp8)

    def _dropout(self, micro: MicroBatch) -> LoraDropout | None:
        if self.spec.dropout == 0.0:
            return None
        seeds = tuple(derive_seed(self.spec.seed, self.calls, datum) for datum in micro.datums)
        return LoraDropout(self.spec.dropout, seeds, micro.lengths)

    def ensure_value_head(self) -> None:
        if self.value is None:
            self.value = self.new_value_head()

    def new_value_head(self) -> ValueHead:
        hidden = self.model.head.weight.shape[1]
        return ValueHead.create(hidden, dtype=self.adapter.master.dtype, device=self.model.device)

    # -- the optimiser -----------------------------------------------------------------------------------------------

    def optim_step(self, params: AdamParams, *, value_learning_rate: float) -> StepResult:
        """Divide the window's sums, clip, AdamW, clear. Interrupts wait until it is whole."""
        if self.window.empty:
            raise StateError("optim_step with nothing accumulated: call forward_backward first")
        settings = [(self.optimiser, self.window, params)]
        if self.value is not None and not self.value.window.empty:
            own = replace(params, learning_rate=value_learning_rate)
            settings.append((self.value.optimiser, self.value.window, own))
        return self._with_room(0, lambda: self._optim_step(settings, params.grad_clip_norm))

    @torch.no_grad()
    def _optim_step(
        self, settings: Sequence[tuple[FlatAdamW, GradientWindow, AdamParams]], max_norm: float
    ) -> StepResult:
        with finish_first():
            factor, norm, bad = clip([window.norm() for _, window, _ in settings], max_norm)
            # Whatever can run out of memory comes before the first thing that changes.
            prepared = [own.prepare(window, params, factor=factor, bad=bad) for own, window, params in settings]
            count, *_ = [apply() for apply in prepared]
            self.adapter.refresh()
            for _, window, _ in settings:
                window.clear()
        return StepResult(lambda: _read_step(norm, bad, count))

    def discard_gradients(self) -> None:
        self.window.clear()
        if self.value is not None:
            self.value.window.clear()


def _longest(units: Sequence[Unit]) -> int:
    return max((sum(datum.length for datum in unit) for unit in units), default=0)


def _read_step(norm: Tensor, skipped: Tensor, count: Tensor) -> tuple[float, bool, int]:
    values = torch.stack([norm.double(), skipped.double(), count.double()]).tolist()
    return values[0], bool(values[1]), int(values[2])


def _normaliser(spec: LossSpec, options: Mapping[str, Any]) -> str:
    """Calls with one divisor share a buffer: sums with divisor 1 all do, others by loss and by what it divides by."""
    if spec.normaliser != "weight":
        return SUMS
    return "/".join([spec.name, *(f"{options[name]}" for name in ("aggregation", "max_tokens") if name in options)])


def _result(outcome: Outcome, spec: LossSpec, call: LossCall) -> LossResult:
    count = sum(len(unit) for unit in call.units)

    def read():
        total = float(outcome.total)
        value = total / float(outcome.weight) if spec.normaliser == "weight" else total
        return value, finish_metrics(outcome.metrics), per_datum(outcome.logprobs, count)

    return LossResult(read)
