"""The history of runs: what a folder holds, how runs end, resume, and compare."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from datetime import datetime
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from local_tinker import runs
from local_tinker.checkpoint import write_folder
from local_tinker.errors import CheckpointError, StateError, UsageError
from local_tinker.runs import Run, compare, final_metrics, git_state, last_unfinished, list_runs
from local_tinker.track import JsonlTracker, TrackedRun

CONFIG = {"model": "tiny", "rank": 8, "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]}, "notes": "größer"}
ROOT = Path(__file__).parents[1]


def start(code: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True)


def log(run: Run, *rows: dict) -> None:
    tracker = JsonlTracker(TrackedRun(run.path))
    for row in rows:
        tracker.log(row.pop("step"), row)
    tracker.close()


def test_a_run_folder_holds_all_that_is_needed_to_run_it_again(tmp_path):
    digest = hashlib.sha256(b"rows").hexdigest()
    run = Run.create(tmp_path / "runs", "pirate", config=CONFIG, data={"a.jsonl": digest}, seeds={"sampler": 7})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-pirate-[0-9a-f]{4}", run.id)
    assert {entry.name for entry in run.path.iterdir() if entry.name[0] != "."} == {
        "run.json", "config.yaml", "checkpoints", "adapter",
    }  # fmt: skip
    assert yaml.safe_load((run.path / "config.yaml").read_text("utf-8")) == CONFIG
    assert list(yaml.safe_load((run.path / "config.yaml").read_text("utf-8"))) == list(CONFIG)
    record = json.loads((run.path / "run.json").read_text())
    assert record["config"] == CONFIG and record["data"] == {"a.jsonl": digest} and record["seeds"] == {"sampler": 7}
    assert record["versions"]["numpy"] == metadata.version("numpy")
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["status"] == "running" and record["sessions"][0]["pid"] == os.getpid()
    run.finish("finished")
    assert [entry for entry in os.listdir(tmp_path / "runs") if entry.startswith(".")] == []


def test_versions_come_without_importing_the_packages():
    code = """
        import sys
        from local_tinker import runs, track
        assert runs.package_versions()["torch"]
        assert not {"torch", "numpy", "transformers", "yaml", "wandb"} & set(sys.modules)
    """
    process = start(code)
    assert process.communicate()[1] == "" and process.returncode == 0


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-rf", "x" * 128])
def test_a_run_name_is_one_plain_path_component(tmp_path, name):
    with pytest.raises(UsageError, match="a name is 1 to 128"):
        Run.create(tmp_path, name, config={})
    assert os.listdir(tmp_path) == []


def test_a_config_that_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.optimizer.lr is nan"):
        Run.create(tmp_path, "a", config={"optimizer": {"lr": float("nan")}})
    assert os.listdir(tmp_path) == []


def test_an_ending_is_recorded_with_cause_and_time_and_only_once(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    run = Run.create(tmp_path, "a", config={})
    assert run.status == "running" and Run.open(run.path).status == "running"
    clock[0] += 12.5
    assert run.seconds == 12.5
    with pytest.raises(UsageError, match="done"):
        run.finish("done")
    run.finish("failed", "out of memory")
    seen = Run.open(run.path)
    assert (seen.status, seen.cause, seen.seconds) == ("failed", "out of memory", 12.5)
    with pytest.raises(StateError, match="not ours to finish"):
        run.finish("finished")
    with pytest.raises(StateError, match="not ours to finish"):
        seen.finish("finished")


def test_leaving_the_block_records_how_the_run_ended(tmp_path):
    with Run.create(tmp_path, "fine", config={}) as fine:
        pass
    with pytest.raises(KeyboardInterrupt), Run.create(tmp_path, "stopped", config={}) as stopped:
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), Run.create(tmp_path, "broken", config={}) as broken:
        1 / 0  # noqa: B018
    endings = [(Run.open(run.path).status, Run.open(run.path).cause) for run in (fine, stopped, broken)]
    assert endings == [
        ("finished", None),
        ("interrupted", "Ctrl-C"),
        ("failed", "ZeroDivisionError: division by zero"),
    ]


RUN_AND_WAIT = """
    import sys
    from local_tinker.runs import Run
    run = Run.create(sys.argv[1], "child", config={"rank": 8})
    print(run.path, flush=True)
    sys.stdin.read()
"""


def test_a_run_whose_process_died_shows_as_interrupted_and_can_be_resumed(tmp_path):
    process = start(RUN_AND_WAIT, tmp_path)
    path = Path(process.stdout.readline().strip())
    assert Run.open(path).status == "running"
    with pytest.raises(StateError, match=f"in use by process {process.pid}"):
        Run.open(path).resume()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = Run.open(path)
    assert (run.status, run.cause, run.seconds) == ("interrupted", "process gone", 0.0)
    began = datetime.fromisoformat(run.record["sessions"][0]["started"]).timestamp()
    (path / "metrics.jsonl").touch()
    os.utime(path / "metrics.jsonl", (began + 60, began + 60))  # its last step
    assert Run.open(path).seconds == 60
    run.resume()
    assert 60 <= run.seconds < 120
    assert run.status == "running" and Run.open(path).status == "running"
    run.finish("finished")
    record = Run.open(path).record
    assert [session["pid"] for session in record["sessions"]] == [process.pid, os.getpid()]
    assert record["status"] == "finished"
    with pytest.raises(StateError, match="is finished"):
        Run.open(path).resume()
    assert not runs.FolderLock(path).held()


def test_a_kill_while_the_record_is_written_leaves_the_old_or_the_new_one(tmp_path):
    code = """
        import os, signal, sys
        from local_tinker import runs
        from local_tinker.checkpoint import Disk
        run = runs.Run.create(sys.argv[1], "child", config={})
        calls, at = [0], int(sys.argv[2])
        for name in ("create", "write", "fsync", "close", "replace", "fsync_dir"):
            def call(self, *args, real=getattr(Disk, name)):
                result = real(self, *args)
                calls[0] += 1
                if calls[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            setattr(Disk, name, call)
        run.finish("finished")
    """
    statuses = []
    for at in range(1, 7):
        process = start(code, tmp_path, at)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        run = list_runs(tmp_path)[-1]
        statuses.append(run.status)
        if run.status == "interrupted":
            run.resume().finish("finished")
            assert not [entry for entry in os.listdir(run.path) if entry.startswith(".tmp")]
    assert statuses == ["interrupted"] * 4 + ["finished"] * 2


def test_a_damaged_or_newer_record_is_refused_and_skipped_aloud_in_a_listing(tmp_path):
    good = Run.create(tmp_path, "good", config={})
    good.finish("finished")
    for text, message in (
        (b"{", "is damaged"),
        (b'{"version": 1}', "id is missing"),
        (b'{"version": 9}', "version 9; this local-tinker reads 1"),
        (b'{"version": NaN}', "is damaged"),
        (b"[1]", "is damaged"),
    ):
        bad = tmp_path / "bad"
        bad.mkdir(exist_ok=True)
        (bad / "run.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=message):
            Run.open(bad)
        said = []
        assert [run.id for run in list_runs(tmp_path, say=said.append)] == [good.id]
        assert len(said) == 1 and message in said[0]
    with pytest.raises(CheckpointError, match="is not a run"):
        Run.open(tmp_path / "nothing")
    assert list_runs(tmp_path / "nothing") == []


def test_runs_are_listed_in_the_order_they_were_made(tmp_path):
    made = []
    for name in ("z", "a", "m"):
        run = Run.create(tmp_path, name, config={})
        run.finish("finished")
        made.append(run.id)
    assert [run.id for run in list_runs(tmp_path)] == made


def test_the_last_unfinished_run_is_of_the_same_config_ended_and_has_saved_something(tmp_path):
    def make(name: str, config: dict, status: str | None, saved: bool = True) -> Run:
        run = Run.create(tmp_path, name, config=config)
        if saved:
            write_folder(run.checkpoints / "step-1", {"f": b"1"}, meta={"step": 1, "owner": run.id})
        if status:
            run.finish(status)
        return run

    wanted = make("wanted", CONFIG, "failed")
    make("done", CONFIG, "finished")
    make("other", {**CONFIG, "rank": 16}, "interrupted")
    make("empty", CONFIG, "failed", saved=False)
    alive = make("alive", CONFIG, None)
    assert last_unfinished(tmp_path, CONFIG).id == wanted.id
    assert last_unfinished(tmp_path, {**CONFIG, "optimizer": {"lr": 1e-4, "betas": (0.9, 0.95)}}).id == wanted.id
    assert last_unfinished(tmp_path, {**CONFIG, "rank": 9}) is None
    alive.finish("interrupted", "Ctrl-C")
    found = last_unfinished(tmp_path, CONFIG)
    assert found.id == alive.id and found.latest_checkpoint().meta["step"] == 1


def test_comparing_gives_what_differs_and_where_each_ended(tmp_path):
    one = Run.create(tmp_path, "one", config=CONFIG, data={"a": "1"})
    other = {**CONFIG, "rank": 8.0, "optimizer": {"lr": 2e-4, "betas": [0.9, 0.95]}, "new": True}
    two = Run.create(tmp_path, "two", config=other, data={"a": "2"})
    log(one, {"step": 1, "loss": 2.0, "accuracy": 0.5}, {"step": 2, "loss": 1.0})
    log(two, {"step": 5, "loss": 3.0, "reward": 1.0})
    assert final_metrics(one) == {"step": 2, "loss": 1.0, "accuracy": 0.5}
    result = compare(one, two)
    assert result.config == {"optimizer.lr": (1e-4, 2e-4), "rank": (8, 8.0), "new": (None, True)}
    assert result.data == {"a": ("1", "2")} and result.versions == {}
    assert result.metrics == {"step": (2, 5), "loss": (1.0, 3.0), "accuracy": (0.5, None), "reward": (None, 1.0)}


def test_git_state_names_the_commit_and_whether_tracked_files_changed(tmp_path):
    assert git_state(tmp_path) is None
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *args], capture_output=True, text=True, check=True
        ).stdout

    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD").strip()
    (tmp_path / "untracked").write_text("1")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
