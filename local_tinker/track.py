"""Metrics of a run: one JSON line a step, always; TensorBoard, Weights & Biases and trackio when asked for by name.

Nothing is imported or contacted unless named, and nothing ever prompts.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from .checkpoint import parse_json, replace_file
from .checks import is_number
from .errors import CheckpointError, MissingDependencyError, UsageError

METRICS = "metrics.jsonl"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_RESERVED = ("step", "time")
_NO_ROW = "not a metrics row with a step and numbers"
# JSON has no such numbers, and a diverged loss must still be recorded.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told: the run's folder and name, its config, and the step it resumes after (None: fresh)."""

    folder: Path
    name: str = "run"
    config: Mapping[str, Any] = field(default_factory=dict)
    resume_step: int | None = None


class Tracker(Protocol):
    """Somewhere metrics go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of one step."""

    def close(self) -> None:
        """Flush and stop; further calls do nothing."""


class JsonlTracker:
    """`metrics.jsonl` in the run's folder, one object a line: `step`, `time` (Unix seconds) and the metrics.

    A resumed run drops the lines after the step it resumes from, which it is about to write again. A fresh tracker
    on an existing file appends. Not-finite values are the strings "nan", "inf" and "-inf".
    """

    def __init__(self, run: TrackedRun) -> None:
        self.path = Path(run.folder) / METRICS
        if self.path.exists():
            _truncate(self.path, run.resume_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._pending = b""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3), **_numbers(metrics)}
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = str(value)
        # One write call a line, so that a killed process leaves at most one cut line, at the end. What a full disk does not
        # take stays here and goes first the next time.
        self._pending += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            rows = self._pending.count(b"\n")
            raise CheckpointError(
                f"the last {rows} rows of {self.path} could not be written ({error.strerror}); the run goes on from before them: "
                "free space and resume it"
            ) from error
        finally:
            self._file.close()


class TensorBoardTracker:
    """Event files in the run's folder under `tensorboard/`."""

    def __init__(self, run: TrackedRun) -> None:
        module = _import("tensorboard")
        # Events after the resumed step are hidden by the viewer, as metrics.jsonl drops them.
        purge = None if run.resume_step is None else run.resume_step + 1
        self._writer = module.SummaryWriter(logdir=str(Path(run.folder) / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases: project from WANDB_PROJECT or "local-tinker"; the run folder's name is the run id."""

    def __init__(self, run: TrackedRun) -> None:
        module = _import("wandb")
        # Without a key wandb.init asks for one on the terminal, and hangs where there is none.
        offline = os.environ.get("WANDB_MODE", "").lower() in ("offline", "dryrun", "disabled")
        if not (offline or os.environ.get("WANDB_API_KEY") or _wandb_has_key(module)):
            raise UsageError(
                "the wandb tracker was asked for but no W&B key is set: run `wandb login`, set WANDB_API_KEY, "
                "or set WANDB_MODE=offline"
            )
        self._run = module.init(
            project=os.environ.get("WANDB_PROJECT", "local-tinker"),
            id=Path(run.folder).name,
            name=run.name,
            config=dict(run.config),
            dir=str(run.folder),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """trackio, on this machine: project from TRACKIO_PROJECT or "local-tinker"."""

    def __init__(self, run: TrackedRun) -> None:
        module = _import("trackio")
        self._run = module.init(
            project=os.environ.get("TRACKIO_PROJECT", "local-tinker"),
            name=Path(run.folder).name,
            config=dict(run.config),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "jsonl": JsonlTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}


class Trackers:
    """Several trackers as one. An optional one that fails is said once and left out; rows that metrics.jsonl cannot take
    (a full disk) are said once, kept, and written when it can, or closing raises."""

    def __init__(self, always: Tracker, optional: dict[str, Tracker], say: Callable[[str], None]) -> None:
        self._always, self._optional, self._say = always, optional, say
        self._told = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._always.log(step, metrics)
        except OSError as error:
            if not self._told:
                self._say(f"{METRICS} cannot be written ({error.strerror}): its rows are kept and written when it can")
            self._told = True
        for name in list(self._optional):
            self._try(name, lambda tracker: tracker.log(step, metrics))

    def close(self) -> None:
        self._always.close()
        for name in list(self._optional):
            self._try(name, lambda tracker: tracker.close())

    def _try(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._optional[name])
        except Exception as error:  # other people's network must not end a training run
            del self._optional[name]
            self._say(f"the {name} tracker failed and is left out from here ({error}); {METRICS} has everything")


def open_trackers(names: Iterable[str], run: TrackedRun, *, say: Callable[[str], None]) -> Trackers:
    """metrics.jsonl plus the trackers named; "none" and "jsonl" add nothing. Unknown names raise with the nearest."""
    wanted = [name for name in dict.fromkeys(names) if name not in ("none", "jsonl")]
    for name in wanted:
        if name not in TRACKERS:
            near = get_close_matches(name, TRACKERS, 1)
            raise UsageError(
                f"got the tracker {name!r}{f': did you mean {near[0]!r}?' if near else ':'} "
                f"allowed are none, {', '.join(TRACKERS)}"
            )
    optional: dict[str, Tracker] = {}
    try:
        for name in wanted:
            optional[name] = TRACKERS[name](run)
        return Trackers(JsonlTracker(run), optional, say)
    except BaseException:
        for tracker in optional.values():
            tracker.close()
        raise


def read_metrics(path: str | Path, *, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, oldest first. A last line cut by a crash is left out; any other bad line raises.

    Args:
        say: hears of a cut last line and of bad ones, which are then left out instead of raising.
    """
    path = Path(path)
    if not path.exists():
        return []
    return [row for row, _ in _rows(path, say=say)]


def _rows(path: Path, *, say: Callable[[str], None] | None = None) -> list[tuple[dict[str, Any], bytes]]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        if say is None:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
        say(f"{path} cannot be read ({error.strerror}); it is left out")
        return []
    rows, bad = [], []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            if say:
                say(f"{path} ends in half a line, as a crash leaves it; that line is left out")
            break
        values = _row(line)
        if values is not None:
            rows.append((values, line))
        elif say is None:
            raise CheckpointError(f"{path}, line {number}: {_NO_ROW}; mend or remove that line")
        else:
            bad.append(number)
    if bad:
        more = f" (nor are {len(bad) - 1} later ones)" if bad[1:] else ""
        say(f"{path}, line {bad[0]}: {_NO_ROW}{more}; left out")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """The numbers of a line, or None where it holds anything else."""
    try:
        row = parse_json(line)
        values = {name: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for name, v in row.items()}
    except (ValueError, AttributeError):
        return None
    whole = isinstance(values.get("step"), int)
    right = whole and all(map(is_number, values.values()))
    return values if right else None


def _truncate(path: Path, last_step: int | None) -> None:
    """Drop a cut last line and, unless None, the rows after `last_step`."""
    kept = b"".join(line for row, line in _rows(path) if last_step is None or row["step"] <= last_step)
    if len(kept) != path.stat().st_size:
        replace_file(path, kept)


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or name in _RESERVED:
            raise UsageError(f"got the metric name {name!r}: names are strings other than {' and '.join(_RESERVED)}")
        try:
            numbers[name] = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise UsageError(f"the metric {name!r} is a {type(value).__name__}: log numbers") from None
    return numbers


def _wandb_has_key(wandb: ModuleType) -> bool:
    """Whether a key is stored on this machine, asked without prompting or contacting anybody."""
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError as error:  # older releases have no prompt=
        raise MissingDependencyError(
            "this wandb cannot look for a key without prompting: pip install -U wandb, or set WANDB_API_KEY"
        ) from error


def check_installed(names: Iterable[str]) -> None:
    """Raise MissingDependencyError for a tracker whose package is not here; imports none of them."""
    for name in names:
        module = _PACKAGES.get(name)
        if module and importlib.util.find_spec(module) is None:
            raise _missing(module, name)


def _missing(module: str, tracker: str) -> MissingDependencyError:
    return MissingDependencyError(f"the {tracker} tracker needs {module}, which is not installed: pip install {module}")


def _import(tracker: str) -> ModuleType:
    module = _PACKAGES[tracker]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, tracker) from error
