"""metrics.jsonl and the optional trackers: what is written, what a resume keeps, and that nothing happens unasked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from local_tinker.errors import CheckpointError, MissingDependencyError, UsageError
from local_tinker.track import TRACKERS, JsonlTracker, TrackedRun, open_trackers, read_metrics


def write(folder: Path, steps: range, *, resume_step: int | None = None, loss: float = 1.0) -> Path:
    tracker = JsonlTracker(TrackedRun(folder, resume_step=resume_step))
    for step in steps:
        tracker.log(step, {"loss": loss / step})
    tracker.close()
    return tracker.path


def test_one_line_a_step_with_step_time_and_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1700000000.12345)
    tracker = JsonlTracker(TrackedRun(tmp_path))
    tracker.log(3, {"loss": 0.5, "tokens": 128, "ratio": Fraction(1, 4)})
    text = (tmp_path / "metrics.jsonl").read_text()  # before close: a reader sees it at once
    assert text == '{"step": 3, "time": 1700000000.123, "loss": 0.5, "tokens": 128, "ratio": 0.25}\n'
    tracker.close()
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(text)]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_not_finite_numbers_survive_in_valid_json(tmp_path):
    tracker = JsonlTracker(TrackedRun(tmp_path))
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    tracker.close()
    text = tracker.path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = read_metrics(tracker.path)[0]
    assert math.isnan(row["a"]) and (row["b"], row["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("metrics", [{"step": 1}, {"time": 1}, {1: 1.0}, {"loss": "low"}, {"loss": None}])
def test_metrics_that_are_no_numbers_or_hide_the_step_are_refused(tmp_path, metrics):
    tracker = JsonlTracker(TrackedRun(tmp_path))
    with pytest.raises(UsageError, match="metric"):
        tracker.log(1, metrics)
    tracker.close()
    assert tracker.path.read_text() == ""


def test_a_resumed_run_drops_the_lines_after_the_step_it_resumes_from(tmp_path):
    write(tmp_path, range(1, 8))
    path = write(tmp_path, range(5, 7), resume_step=4, loss=100.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25), (5, 20.0), (6, pytest.approx(100 / 6)),
    ]  # fmt: skip


def test_a_fresh_tracker_appends(tmp_path):
    write(tmp_path, range(1, 3))
    path = write(tmp_path, range(3, 5))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_line_cut_by_a_crash_is_ignored_by_readers_and_removed_by_the_next_writer(tmp_path):
    path = write(tmp_path, range(1, 4))
    for cut in (b'{"step": 4, "los', b'{"step": 4, "time": 1.0, "loss": 0.1}', b"{"):
        with open(path, "ab") as file:
            file.write(cut)
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
        write(tmp_path, range(0))
        assert path.read_bytes().endswith(b"}\n") and len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b'{"step": 1, "a": NaN}\n', b"3\n"]
)
def test_a_bad_line_inside_the_file_is_named(tmp_path, line):
    path = write(tmp_path, range(1, 3))
    path.write_bytes(path.read_bytes() + line + b'{"step": 9}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 3"):
        read_metrics(path)


def test_unknown_trackers_are_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'wandb'"):
        open_trackers(["wandbb"], TrackedRun(tmp_path), say=print)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {package}"):
        open_trackers([name], TrackedRun(tmp_path), say=print)


def test_a_tracker_that_cannot_open_closes_those_that_did(tmp_path, monkeypatch):
    module = Recorder()
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingDependencyError):
        open_trackers(["tensorboard", "trackio"], TrackedRun(tmp_path), say=print)
    assert module.calls[-1] == ("close",)


def test_nothing_is_imported_or_contacted_unless_asked(tmp_path):
    code = (
        "import sys, socket\n"
        "from pathlib import Path\n"
        "from local_tinker.track import *\n"
        "def refuse(event, args):\n"
        "    if event.startswith('socket.'): raise SystemExit(event)\n"
        "sys.addaudithook(refuse)\n"
        "t = open_trackers(['none'], TrackedRun(Path(sys.argv[1])), say=print)\n"
        "t.log(1, {'loss': 1.0}); t.close()\n"
        "assert not {'wandb', 'trackio', 'tensorboardX', 'tensorboard', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


class Recorder:
    """Stands in for the optional packages: records what is called on it."""

    def __init__(self, key: str | None = None) -> None:
        self.calls: list[tuple] = []
        self.key = key

    def login(self, *, prompt, verify):
        assert (prompt, verify) == (False, False)
        return bool(self.key)

    def init(self, **settings):
        self.calls.append(("init", settings))
        return self

    def SummaryWriter(self, **settings):  # noqa: N802
        return self.init(**settings)

    def log(self, metrics, *, step):
        self.calls.append(("log", dict(metrics), step))

    def add_scalar(self, name, value, *, global_step):
        self.calls.append(("scalar", name, value, global_step))

    def finish(self):
        self.calls.append(("finish",))

    def close(self):
        self.calls.append(("close",))


def track_one(monkeypatch, tmp_path, name, package, module, resume_step=None):
    monkeypatch.setitem(sys.modules, package, module)
    folder = tmp_path / "2025-01-01-a-1234"
    folder.mkdir()
    trackers = open_trackers([name], TrackedRun(folder, "a", {"rank": 8}, resume_step), say=print)
    trackers.log(4, {"loss": 0.5})
    trackers.close()
    assert [row["loss"] for row in read_metrics(folder / "metrics.jsonl")] == [0.5]
    return module.calls


def test_tensorboard_gets_scalars_and_purges_what_a_resume_repeats(tmp_path, monkeypatch):
    calls = track_one(monkeypatch, tmp_path, "tensorboard", "tensorboardX", Recorder(), resume_step=3)
    assert calls[0][1]["purge_step"] == 4 and calls[0][1]["logdir"].endswith("2025-01-01-a-1234/tensorboard")
    assert calls[1:] == [("scalar", "loss", 0.5, 4), ("close",)]


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("trackio", "trackio")])
def test_hosted_style_trackers_get_id_config_and_steps(tmp_path, monkeypatch, name, package):
    calls = track_one(monkeypatch, tmp_path, name, package, Recorder(key="k"))
    settings = calls[0][1]
    assert settings["config"] == {"rank": 8} and settings["resume"] == "allow"
    assert "2025-01-01-a-1234" in (settings.get("id"), settings["name"])
    assert calls[1:] == [("log", {"loss": 0.5}, 4), ("finish",)]


def test_wandb_without_a_key_is_an_error_not_a_prompt(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    module = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UsageError, match="wandb login"):
        open_trackers(["wandb"], TrackedRun(tmp_path), say=print)
    assert module.calls == []
    module.login = lambda: None
    with pytest.raises(MissingDependencyError, match="pip install -U wandb"):
        open_trackers(["wandb"], TrackedRun(tmp_path), say=print)
    monkeypatch.setenv("WANDB_MODE", "offline")
    open_trackers(["wandb"], TrackedRun(tmp_path), say=print).close()
    assert [call[0] for call in module.calls] == ["init", "finish"]


def test_an_optional_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    module = Recorder(key="k")
    monkeypatch.setitem(sys.modules, "wandb", module)
    said = []
    trackers = open_trackers(["wandb"], TrackedRun(tmp_path), say=said.append)

    def fail(metrics, *, step):
        raise ConnectionError("no route")

    module.log = fail
    trackers.log(1, {"loss": 1.0})
    trackers.log(2, {"loss": 0.5})
    trackers.close()
    assert said == ["the wandb tracker failed and is left out from here (no route); metrics.jsonl has everything"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_every_tracker_is_named_once():
    assert list(TRACKERS) == ["jsonl", "tensorboard", "wandb", "trackio"]
