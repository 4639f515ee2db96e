"""The history of runs: one folder each, holding all that is needed to know what ran, to resume it and to run it again.

`<root>/<date>-<name>-<4 hex>/` with run.json, config.yaml, metrics.jsonl, checkpoints/ and adapter/.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .checkpoint import (
    Checkpoint,
    FolderLock,
    check_name,
    dump_json,
    latest_valid,
    parse_json,
    plain,
    replace_file,
    stage_folder,
    sweep,
)
from .errors import CheckpointError, StateError, UsageError
from .run_record import what_is_wrong
from .track import METRICS, read_metrics

RECORD = "run.json"
RECORD_VERSION = 1
STATUSES = ("finished", "failed", "interrupted")
PROCESS_GONE = "process gone"
_PACKAGES = (
    "local-tinker", "torch", "transformers", "peft", "bitsandbytes", "triton", "safetensors", "tokenizers", "datasets",
    "numpy",
)  # fmt: skip


class Run:
    """One run. `create` and `resume` own it, under a lock, until `finish`; `open` only looks.

    As a context manager it finishes by itself: "finished", "interrupted" on Ctrl-C, "failed" with the error otherwise.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self._record = record
        self._lock: FolderLock | None = None
        self._began = 0.0

    @classmethod
    def create(
        cls,
        root: str | Path,
        name: str,
        *,
        config: Mapping[str, Any],
        data: Mapping[str, str] | None = None,
        seeds: Mapping[str, int] | None = None,
    ) -> Run:
        """Make a run's folder and record.

        Args:
            name: one path component; the folder adds the date and 4 hex digits.
            config: the resolved config, plain values; also written as config.yaml.
            data: source -> sha256 of the rows used.
            seeds: what was seeded -> seed.
        """
        import yaml

        root = Path(root)
        config = plain(dict(config), where="config")
        now = datetime.now(UTC)
        path = root / check_name(f"{datetime.now():%Y-%m-%d}-{check_name(name)}-{secrets.token_hex(2)}")
        record = {
            "version": RECORD_VERSION,
            "id": path.name,
            "name": name,
            "status": "running",
            "cause": None,
            "config": config,
            "data": dict(data or {}),
            "seeds": dict(seeds or {}),
            "versions": package_versions(),
            "git": git_state(Path.cwd()),
            "created": now.isoformat(),
            "sessions": [_session(now)],
        }
        files = {
            RECORD: dump_json(record, where="run"),
            "config.yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode(),
        }
        stage_folder(path, files, folders=("checkpoints", "adapter"))
        run = cls(path, record)
        run._own()
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Look at a run's folder."""
        path = Path(path)
        try:
            raw = (path / RECORD).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} is not a run: its {RECORD} cannot be read ({error.strerror})") from error
        try:
            record = parse_json(raw)
            version = record["version"]
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path / RECORD} is damaged ({error}); restore or remove the folder") from None
        if version != RECORD_VERSION:
            raise CheckpointError(
                f"{path / RECORD} has version {version!r}; this local-tinker reads {RECORD_VERSION}: upgrade it"
            )
        wrong = what_is_wrong(record)
        if wrong:
            raise CheckpointError(f"{path / RECORD} is damaged ({wrong}); restore or remove the folder")
        return cls(path, record)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def name(self) -> str:
        return self._record["name"]

    @property
    def created(self) -> str:
        """UTC, ISO 8601."""
        return self._record["created"]

    @property
    def config(self) -> dict[str, Any]:
        return self._record["config"]

    @property
    def record(self) -> dict[str, Any]:
        """All of run.json, with `status` and `cause` as they are now."""
        return {**self._record, "status": self.status, "cause": self.cause, "seconds": self.seconds}

    @property
    def status(self) -> str:
        """running, finished, failed or interrupted; a run whose process died without a word is interrupted."""
        return "interrupted" if self._died() else self._record["status"]

    @property
    def cause(self) -> str | None:
        return PROCESS_GONE if self._died() else self._record.get("cause")

    @property
    def seconds(self) -> float:
        """Time spent in sessions that ended, in this one if it is ours, and in another process's up to its last step."""
        done = sum(session.get("seconds") or 0.0 for session in self._record["sessions"])
        return done + (time.monotonic() - self._began if self._lock else self._unended())

    def _unended(self) -> float:
        """Seconds from the start of a last session without an end to what it wrote last."""
        last = self._record["sessions"][-1]
        if last.get("seconds") is not None or not (self.path / METRICS).exists():
            return 0.0
        began = datetime.fromisoformat(last["started"]).timestamp()
        return round(max(0.0, (self.path / METRICS).stat().st_mtime - began), 3)

    @property
    def resumable(self) -> bool:
        """Whether it has ended unfinished and has saved something to resume from."""
        saved = self.checkpoints.is_dir() and any(not entry.startswith(".") for entry in os.listdir(self.checkpoints))
        return saved and self.status in ("interrupted", "failed")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def metrics(self, *, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl; a bad one raises, or is left out when `say` is there to hear of it."""
        return read_metrics(self.path / METRICS, say=say)

    def latest_checkpoint(self, *, say: Callable[[str], None] | None = None) -> Checkpoint | None:
        return latest_valid(self.checkpoints, say=say)

    def resume(self) -> Run:
        """Take an unfinished run over, in a new session; raises StateError while another process has it."""
        self._own()
        fresh = Run.open(self.path)
        if fresh._record["status"] == "finished":
            self._disown()
            raise StateError(f"run {self.id} is finished: start a new one, from its last checkpoint if you like")
        now, before = datetime.now(UTC), fresh._record["sessions"]
        if before[-1].get("seconds") is None:  # its process died
            before = [*before[:-1], {**before[-1], "seconds": fresh._unended()}]
        self._record = {
            **fresh._record,
            "status": "running",
            "cause": None,
            "versions": package_versions(),
            "sessions": [*before, _session(now)],
        }
        self._write()
        return self

    def note(self, **facts: Any) -> None:
        """Add plain values to run.json."""
        if self._lock is None:
            raise StateError(f"run {self.id} is not ours to write: it was opened to look at, or has ended")
        self._record = {**self._record, **plain(facts, where="note")}
        self._write()

    def finish(self, status: str, cause: str | None = None) -> None:
        """Record how the run ended and give it up."""
        if status not in STATUSES:
            raise UsageError(f"got status {status!r}: a run ends as one of {', '.join(STATUSES)}")
        if self._lock is None:
            raise StateError(f"run {self.id} is not ours to finish: it was opened to look at, or has ended")
        last = {
            **self._record["sessions"][-1],
            "ended": datetime.now(UTC).isoformat(),
            "seconds": round(time.monotonic() - self._began, 3),
        }
        self._record = {
            **self._record,
            "status": status,
            "cause": cause,
            "sessions": [*self._record["sessions"][:-1], last],
        }
        try:
            self._write()
        finally:
            self._disown()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._lock is None:
            return
        if kind is None:
            self.finish("finished")
        elif issubclass(kind, KeyboardInterrupt):
            self.finish("interrupted", "Ctrl-C")
        else:
            # A full disk must not hide the error that ended the run.
            with suppress(CheckpointError):
                self.finish("failed", f"{kind.__name__}: {error}")

    def _own(self) -> None:
        lock = FolderLock(self.path).acquire()
        self._lock, self._began = lock, time.monotonic()
        sweep(self.path)
        sweep(self.checkpoints)

    def _disown(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _died(self) -> bool:
        return self._record["status"] == "running" and self._lock is None and not FolderLock(self.path).held()

    def _write(self) -> None:
        replace_file(self.path / RECORD, dump_json(self._record, where="run"))


def list_runs(root: str | Path, *, say: Callable[[str], None] | None = None) -> list[Run]:
    """Every run in `root`, oldest first. `say` hears of run folders that cannot be read."""
    root = Path(root)
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.name.startswith(".") or not (path / RECORD).is_file():
            continue
        try:
            found.append(Run.open(path))
        except CheckpointError as error:
            if say:
                say(str(error))
    return sorted(found, key=lambda run: (run.created, run.id))


def runs_of(root: str | Path, config: Mapping[str, Any] | None = None) -> list[Run]:
    """The runs of a folder, of exactly this config where one is given, newest first."""
    wanted = None if config is None else plain(dict(config), where="config")
    return [run for run in reversed(list_runs(root)) if wanted is None or run.config == wanted]


def last_unfinished(
    root: str | Path, config: Mapping[str, Any] | None = None, *, only_newest: bool = False
) -> Run | None:
    """The newest run that has ended unfinished and has saved something to resume from.

    Args:
        config: only runs of exactly this config.
        only_newest: None when a newer run of that config ended otherwise.
    """
    for run in runs_of(root, config):
        if run.resumable:
            return run
        if only_newest:
            return None
    return None


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side: dotted name -> (left, right). Absent is None. `metrics` are the last values of each."""

    config: dict[str, tuple[Any, Any]]
    versions: dict[str, tuple[Any, Any]]
    data: dict[str, tuple[Any, Any]]
    metrics: dict[str, tuple[Any, Any]]


def compare(a: Run, b: Run, *, say: Callable[[str], None] | None = None) -> Comparison:
    """What differs between two runs, and every final metric of either. `say` hears of bad metrics, left out."""
    left, right = a.record, b.record
    return Comparison(
        config=_differences(left["config"], right["config"]),
        versions=_differences(left.get("versions", {}), right.get("versions", {})),
        data=_differences(left.get("data", {}), right.get("data", {})),
        metrics=_pairs(final_metrics(a, say=say), final_metrics(b, say=say)),
    )


def final_metrics(run: Run, *, say: Callable[[str], None] | None = None) -> dict[str, float]:
    """The last value of every metric, and the last `step`. `say` hears of bad rows, left out."""
    last: dict[str, float] = {}
    for row in run.metrics(say=say):
        last.update(row)
    last.pop("time", None)
    return last


def package_versions() -> dict[str, str | None]:
    """Installed versions, without importing anything; None where a package is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder` and whether tracked files differ from it; None where there is none."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), "--no-optional-locks", *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _session(now: datetime) -> dict[str, Any]:
    process = {"pid": os.getpid(), "host": platform.node(), "command": shlex.join(sys.argv)}
    return {"started": now.isoformat(), "ended": None, "seconds": None, **process}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _pairs(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (left.get(key), right.get(key)) for key in [*left, *(key for key in right if key not in left)]}


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = _pairs(_flat(left), _flat(right))
    # True == 1 == 1.0 in Python, but not in a config file.
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] or type(pair[0]) is not type(pair[1])}
