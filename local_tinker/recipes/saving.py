"""Which checkpoints a run writes and keeps: every N steps or minutes, the last few and the best, with room on the disk."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, StateError
from . import report
from .config import Common

if TYPE_CHECKING:
    from ..runs import Run

# What "best" means: the first of these that the evaluation gives, and whether more is better.
JUDGED_BY = {"eval_reward": True, "eval_loss": False}
_SMALL_FILES = 32 << 20  # tokenizer, config, manifests, metrics: the largest tokenizers come near to it


class Saver:
    """The checkpoints of one run.

    Attributes:
        best: {"step", "metric", "value", "folder"} of the best evaluation so far, or None; `folder` is where its weights are.
    """

    def __init__(self, config: Common, trainer: Any, run: Run) -> None:
        self._config, self._trainer, self._run = config, trainer, run
        self._saved_at, self._clock = -1, time.monotonic()
        self.best: dict[str, Any] | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        minutes = self._config.save_minutes
        late = minutes is not None and time.monotonic() - self._clock >= 60 * minutes
        return late or (self._config.save_every is not None and step % self._config.save_every == 0)

    def judge(self, step: int, numbers: Mapping[str, float]) -> dict[str, Any] | None:
        """What `best` would be with this evaluation, or None when it is not better."""
        metric = next((name for name in JUDGED_BY if name in numbers), None)
        if metric is None or not math.isfinite(numbers[metric]):
            return None
        value = float(numbers[metric])
        if self.best is not None:
            better = value > self.best["value"] if JUDGED_BY[metric] else value < self.best["value"]
            if not better:
                return None
        return {"step": step, "metric": metric, "value": value, "folder": f"checkpoints/{_name(step)}"}

    def save(
        self,
        step: int,
        extra: Mapping[str, Any],
        *,
        best: dict[str, Any] | None = None,
        discard_gradients: bool = False,
    ) -> None:
        """Write the state after `step` and let older ones go; `best` when this one is it.

        Raises:
            CheckpointError: with nothing changed, on the disk and here.
        """
        from ..checkpoint import rotate

        self._clock = time.monotonic()  # also after a failure, so that a full disk is not asked at every step
        if self._saved_at != step:
            path = self._run.checkpoints / _name(step)
            told = {**extra, "step": step, "best": best or self.best}
            self._trainer.save_state(path, overwrite=True, discard_gradients=discard_gradients, extra=told)
            self._saved_at = step
        if best is not None:
            self.mark(best)
        keep = [] if self.best is None else [Path(self.best["folder"]).name]
        try:
            # a state names no owner, and this folder holds this run's only
            rotate(self._run.checkpoints, self._config.keep_last, keep=keep, owner=None)
        except CheckpointError as error:
            report.say(str(error))  # the new one stands; an old one too many harms nobody

    def mark(self, best: dict[str, Any]) -> None:
        """Remember the best evaluation, in run.json too."""
        self.best = best
        self._run.note(best=best)

    def load(self) -> dict[str, Any]:
        """Bring the trainer to the newest whole checkpoint; returns what was saved with it."""
        checkpoint = self._run.latest_checkpoint(say=report.say)
        if checkpoint is None:
            raise StateError(f"run {self._run.id} has no whole checkpoint to go on from; start it anew with --fresh")
        extra = self._trainer.load_state(checkpoint.path)
        self._saved_at, self.best = extra["step"], extra["best"]
        return extra


def check_disk(config: Common, trainer: Any, *, evaluated: bool, run: Run | None = None) -> None:
    """Say what the run may take on the disk, before it begins.

    Args:
        evaluated: there are rows held out, so that a best checkpoint is kept too.
        run: a run about to be resumed, whose checkpoints are there already.

    Raises:
        CheckpointError: there is less, naming bytes and folder.
    """
    state = trainer.state_bytes
    # one more than is kept: the new one is whole before an old one goes
    count = config.keep_last + 1 + evaluated
    # an adapter that is written again stands beside the old one for a moment
    need = count * state + 2 * state // 3 + _SMALL_FILES
    if run is not None:
        need -= sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    folder = Path(config.output_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{config.output_dir} has {report.gib(free)} free and the run may need {report.gib(need)} ({need:,} bytes: {count} "
            f"checkpoints of {report.gib(state)} and the adapter); free space, lower keep_last or rank, or name another output_dir"
        )
    report.say(f"disk: up to {report.gib(max(need, 0))} of the {report.gib(free)} free in {config.output_dir}")


def _name(step: int) -> str:
    return f"step-{step:06d}"
