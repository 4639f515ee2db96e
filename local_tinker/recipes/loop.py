"""What every training loop needs around its two calls: progress, evaluation, checkpoints, resuming, a clean end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, LocalTinkerError
from . import report
from .config import Common, resolved, run_name
from .saving import Saver, check_disk
from .signals import Signals

if TYPE_CHECKING:
    from ..data.batches import Batches
    from ..runs import Run
    from ..types import AdamParams, LossResult, StepResult
    from .data import Data

MOST_SKIPPED = 3  # steps in a row whose gradient was not finite
_ANSWER_TOKENS = 64


class Session:
    """One run of a loop: iterate it for batches, call `log` once in the body.

    Entering makes (or takes over) the run's folder. Leaving saves: the adapter at the end, and state and adapter when
    the loop is interrupted or fails, so that `run --resume` continues exactly.

    Args:
        updates: optimiser steps one body takes; None when that varies. A body cut short between two of its steps is not saved:
            the run goes on from the checkpoint before it.

    Attributes:
        step: steps finished. total: steps of the whole run.
    """

    def __init__(
        self,
        config: Common,
        trainer: Any,
        order: Batches,
        data: Data,
        *,
        loss: str,
        resume: Run | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        headline: tuple[str, ...] = ("loss",),
        updates: int | None = 1,
    ) -> None:
        self.config, self.trainer, self.order, self.data, self.loss = config, trainer, order, data, loss
        self.step, self.total = 0, config.max_steps or len(order)
        self._resume, self._evaluate, self.headline, self._updates = resume, evaluate, headline, updates
        self._signals = Signals()
        self._cursor = order.state()
        self._skipped, self._logged, self._evaluated = 0, False, -1
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    # -- the loop ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[list[Any]]:
        if self.step % (self.config.eval_every or self.total) == 0:
            best = self._run_evaluation()
            if best is not None and self.step < self.total:
                self._save_or_say(best)
        for batch in self.order if self.step < self.total else ():
            self._batch, self._logged = batch, False
            yield batch
            self._finish_step()
            if self.step >= self.total:
                break
        best = self._run_evaluation()
        if best is not None:
            self._saver.mark({**best, "folder": "adapter"})

    @property
    def adam(self) -> AdamParams:
        """Settings of the optimiser step about to be taken."""
        from ..types import AdamParams

        rate = self.config.learning_rate_at(self.step, self.total)
        return AdamParams(
            learning_rate=rate, weight_decay=self.config.weight_decay, grad_clip_norm=self.config.grad_clip_norm
        )

    def log(self, loss: LossResult, step: StepResult, **more: float) -> None:
        """Record the step's numbers and show them."""
        tokens = sum(len(values) for values in loss.logprobs)
        numbers = {
            "loss": float(loss),
            **loss.metrics,
            **more,
            "learning_rate": self.adam.learning_rate,
            "grad_norm": step.grad_norm,
        }
        self._skipped = self._skipped + 1 if step.skipped else 0
        shown = {name: numbers[name] for name in self.headline if name in numbers}
        speed = self._progress.step(self.step + 1, shown, tokens)
        extra = {
            "tokens": tokens,
            "tokens_per_second": speed,
            "epoch": self.order.epoch + self.order.position / self.order.per_epoch,
        }
        self._trackers.log(
            self.step + 1, {**numbers, **extra, "skipped": int(step.skipped), "memory_bytes": report.used_bytes()}
        )
        self.first = {**numbers, **self.first}
        self.last, self._logged = numbers, True

    def _finish_step(self) -> None:
        assert self._logged, "the loop's body calls session.log once a step"
        self.step, self._cursor, self._applied = self.step + 1, self.order.state(), self.trainer.step
        if self._skipped:
            self._progress.note(f"step {self.step}: the gradient was not finite; the weights are unchanged")
        if self._skipped >= MOST_SKIPPED:
            raise LocalTinkerError(
                f"{MOST_SKIPPED} steps in a row had a gradient that is not finite; the last batch was {_name(self._batch)}. "
                "Lower learning_rate, or look at those rows"
            )
        best = None
        if self.config.eval_every and self.step % self.config.eval_every == 0 and self.step < self.total:
            best = self._run_evaluation()
        if self.step < self.total and (best is not None or self._saver.due(self.step)):
            self._save_or_say(best)
        if self._signals.asked:
            raise KeyboardInterrupt

    def _run_evaluation(self) -> dict[str, Any] | None:
        """Evaluate, once a step; returns what the best evaluation is now if this one is it."""
        if self._evaluate is None or not len(self.data.held_out) or self._evaluated == self.step:
            return None
        numbers = dict(self._evaluate())
        self._trackers.log(self.step, numbers)
        self._progress.note(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
        self.last = {**self.last, **numbers}
        self.first = {**numbers, **self.first}
        self._evaluated = self.step
        return self._saver.judge(self.step, numbers) if self.step else None

    # -- begin and end -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        from ..runs import Run
        from ..track import TrackedRun, open_trackers
        from .early import tracker_names

        config = self.config
        values = resolved(config, self.loss)
        check_disk(config, self.trainer, evaluated=bool(len(self.data.held_out)), run=self._resume)
        if self._resume is None:
            self.run = Run.create(
                config.output_dir,
                run_name(config, self.loss),
                config=values,
                data=self.data.digests,
                seeds={"seed": config.seed},
            )
        else:
            self.run = self._resume.resume()
        self._saver = Saver(config, self.trainer, self.run)
        try:
            if self._resume is not None:
                self._load()
            self._applied = self.trainer.step
            tracked = TrackedRun(self.run.path, self.run.name, values, self.step if self._resume is not None else None)
            self._trackers = open_trackers(tracker_names(config), tracked, say=report.say)
        except BaseException as error:
            self.run.finish("failed", f"{type(error).__name__}: {error}")
            raise
        steps, rows = self.total - self.step, min(config.batch_size, len(self.data.rows))
        report.say(f"run {self.run.path}, {steps:,} {'step' if steps == 1 else 'steps'} of {rows} rows")
        self._progress = report.ProgressReport(self.total, done=self.step)
        self._signals.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        with self._signals.saving():
            try:
                with suppress(OSError):
                    self._progress.close()
                if kind is None:
                    self._end("finished", None)
                elif issubclass(kind, KeyboardInterrupt):
                    self._stop("interrupted", self._signals.cause)
                else:
                    # what ended the run must not be hidden by a save that fails too
                    with suppress(Exception):
                        self._stop("failed", f"{kind.__name__}: {error}")
            finally:
                self._trackers.close()
                self._signals.restore()

    def _stop(self, status: str, cause: str) -> None:
        done = self.trainer.step - self._applied
        try:
            if done and not self._logged and done != self._updates:
                report.say(f"stopped in the middle of step {self.step + 1}: its updates are not part of any checkpoint")
                return
            # an interrupt can fall between an optimiser step and its bookkeeping: then that batch has been used
            if done:
                self.step, self._cursor, self._applied = self.step + 1, self.order.state(), self.trainer.step
            self._saver.save(self.step, self._extra(), discard_gradients=True)
            report.say(f"saved after step {self.step}; to go on: local-tinker run --resume {self.run.path}")
        finally:
            self._end(status, cause)

    def _end(self, status: str, cause: str | None) -> None:
        try:
            self.trainer.save_adapter(self.run.adapter, overwrite=True)
        except BaseException as error:
            # the checkpoints are there: resuming writes the adapter again
            self.run.finish("failed", f"{cause or 'the adapter was not saved'}: {type(error).__name__}: {error}")
            raise
        self.run.finish(status, cause)

    def _extra(self) -> dict[str, Any]:
        return {"batches": self._cursor, "skipped": self._skipped, "evaluated": self._evaluated}

    def _save_or_say(self, best: dict[str, Any] | None) -> None:
        """A checkpoint on the way. One that fails costs no training: the disk may have room by the next."""
        try:
            self._saver.save(self.step, self._extra(), best=best)
        except CheckpointError as error:
            self._progress.note(
                f"step {self.step}: NO CHECKPOINT: {error}. Training goes on; the next one is tried in time"
            )

    def _load(self) -> None:
        extra = self._saver.load()
        self.order.load(extra["batches"])
        self.step, self._cursor, self._skipped = extra["step"], extra["batches"], extra["skipped"]
        self._evaluated = extra["evaluated"]
        for row in self.run.metrics():
            self.first = {**row, **self.first} if row["step"] <= self.step else self.first
        report.say(f"resuming {self.run.id} after step {self.step}")


# -- shared steps of the recipes ---------------------------------------------------------------------------------------


def prepare(config: Common, loss: str) -> tuple[Any, Data]:
    """What every recipe begins with: everything that can be checked quickly, then config, memory plan and model.

    Returns:
        the trainer and the rows as read.
    """
    from .. import ServiceClient  # here, so that --help does not wait for it
    from . import early
    from .data import load_data

    early.check_config(config)
    data = load_data(config, say=report.say)
    early.check_rows(config, data, loss)
    report.print_config(resolved(config, loss))
    service = ServiceClient(deterministic=config.deterministic)
    announce_plan(config, service.hardware)
    return service.create_lora_training_client(config.model, **config.client()), data


def order_of(config: Common, data: Data) -> Batches:
    """The batches of the whole run: `max_steps` of them, or `epochs` passes."""
    from .. import batches

    if config.batch_size > len(data.rows):
        report.say(f"batch_size={config.batch_size:,} is more than the {len(data.rows):,} rows: a step takes them all")
    order = batches(data.rows, batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)
    if config.max_steps and config.max_steps > len(order):
        epochs = -(-config.max_steps // order.per_epoch)
        report.say(
            f"max_steps={config.max_steps:,} is more than the {len(order):,} steps of epochs={config.epochs}: {epochs} passes"
        )
        order = batches(data.rows, batch_size=config.batch_size, epochs=epochs, seed=config.seed)
    return order


def announce_plan(config: Common, hardware: Any) -> None:
    """The memory plan, when the model's dimensions are known before it is loaded."""
    from ..errors import ModelError
    from ..model import catalogue

    try:
        dims = catalogue.dims(config.model)
    except ModelError:
        report.say("memory plan: after the model is here (its dimensions are not known yet)")
        return
    plan = report.plan_for(config, dims, hardware)
    report.print_lines(report.plan_lines(plan, hardware.free_bytes))


def model_length(model: str) -> int:
    """The model's context, in tokens."""
    from ..model import catalogue

    return catalogue.dims(model).max_positions


def answers(
    trainer: Any, data: Data, loss: str, *, count: int, max_tokens: int = _ANSWER_TOKENS
) -> list[tuple[Any, str, str | None]]:
    """(prompt, the model's answer now, the data's answer) for the first rows."""
    from .data import question_of

    asked = [question_of(row, loss) for row in data.shown[:count]]
    if not asked:
        return []
    sampler = trainer.save_weights_and_get_sampling_client()
    said = sampler.sample_batch([prompt for prompt, _ in asked], max_tokens=max_tokens, temperature=0)
    return [(prompt, text, expected) for (prompt, expected), text in zip(asked, said, strict=True)]


def finish(session: Session, *, max_tokens: int = _ANSWER_TOKENS) -> Path:
    """What came out, a few answers, and the next command."""
    config, run = session.config, session.run
    told = [
        name
        for name in session.last
        if name in session.first and (name in ("loss", *session.headline) or name.startswith("eval_"))
    ]
    changes = [f"{name} {session.first[name]:.4f} -> {session.last[name]:.4f}" for name in told]
    steps = f"{session.step:,} {'step' if session.step == 1 else 'steps'}"
    report.print_lines(["", f"finished after {steps}: {', '.join(changes)}"])
    print(f"adapter: {run.adapter}")
    best = run.record.get("best")
    if best is not None and best["folder"] != "adapter":
        print(f"best {best['metric']} {best['value']:.4f} was after step {best['step']}: {run.path / best['folder']}")
    asked = answers(session.trainer, session.data, session.loss, count=config.samples, max_tokens=max_tokens)
    report.print_answers(asked)
    print(f"\nnext: local-tinker chat {run.path}", flush=True)
    return run.path


def _name(batch: list[Any]) -> str:
    named = [str(source) for row in batch if (source := getattr(row, "source", None))]
    return ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
