"""Which checkpoints a run writes and keeps, and what a full disk costs it."""

import errno
import json
import math
import os
from types import SimpleNamespace

import pytest

from local_tinker.checkpoint import Disk, latest_valid, read_folder
from local_tinker.cli import app
from local_tinker.errors import CheckpointError
from local_tinker.recipes import saving
from local_tinker.recipes.saving import Saver, check_disk
from local_tinker.recipes.sft import Config
from local_tinker.runs import list_runs
from local_tinker.training import TrainingClient


def names(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


def column(run, name):
    return [row[name] for row in run.metrics() if name in row]


def test_a_checkpoint_is_written_when_the_minutes_are_over(words, the_run, monkeypatch, tmp_path):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: clock.now))
    step = TrainingClient.optim_step

    def optim_step(self, *args, **kwargs):
        clock.now += 60.0
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TrainingClient, "optim_step", optim_step)
    flags = words(max_steps=11, samples=0, save_every=5, keep_last=100)
    assert app.main(["run", *flags, "--save-minutes", "3"]) == 0
    # every third minute, counted from the last checkpoint whatever asked for it
    assert names(the_run()) == [f"step-{step:06d}" for step in (3, 5, 8, 10)]
    assert app.main(["run", *flags, "--save-minutes", "none", "--output-dir", str(tmp_path / "other")]) == 0
    assert names(list_runs(tmp_path / "other")[0]) == ["step-000005", "step-000010"]
    assert Config(model="m", dataset="d").save_minutes == 10


@pytest.fixture
def judged(monkeypatch):
    """Evaluations that give these losses instead of the real ones."""

    def arrange(*values):
        given = iter(values)
        real = TrainingClient.forward
        monkeypatch.setattr(
            TrainingClient, "forward", lambda self, *args, **kw: real(self, *args, **kw) and next(given)
        )

    return arrange


def test_the_best_evaluation_keeps_its_checkpoint_whatever_comes_after(words, the_run, judged, capsys):
    judged(9.0, 3.0, 2.0, 2.5, math.nan, 2.0, 4.0)
    flags = words(max_steps=6, eval_fraction=0.2, eval_every=1, save_every=1, keep_last=1, samples=0)
    assert app.main(["run", *flags]) == 0
    run = the_run()
    assert names(run) == ["step-000002", "step-000005"]
    best = {"step": 2, "metric": "eval_loss", "value": 2.0, "folder": "checkpoints/step-000002"}
    assert run.record["best"] == best and read_folder(run.path / best["folder"]).meta["extra"]["best"] == best
    assert f"best eval_loss 2.0000 was after step 2: {run.path}/checkpoints/step-000002" in capsys.readouterr().out


def test_the_best_is_saved_without_any_schedule_and_may_be_the_end(words, the_run, judged):
    judged(9.0, 3.0, 4.0, 2.0)
    assert app.main(["run", *words(max_steps=3, eval_fraction=0.2, eval_every=1, samples=0)]) == 0
    run = the_run()
    assert names(run) == ["step-000001"]
    assert run.record["best"] == {"step": 3, "metric": "eval_loss", "value": 2.0, "folder": "adapter"}


def test_more_reward_is_better_and_less_loss_is():
    saver = Saver(Config(model="m", dataset="d"), None, None)
    saver.best = {"step": 1, "metric": "eval_reward", "value": 0.5, "folder": "x"}
    assert saver.judge(2, {"eval_reward": 0.4}) is None and saver.judge(2, {"eval_reward": 0.6})["value"] == 0.6
    assert saver.judge(2, {"eval_reward": math.inf}) is None and saver.judge(2, {"other": 1.0}) is None
    saver.best = {"step": 1, "metric": "eval_loss", "value": 0.5, "folder": "x"}
    assert saver.judge(2, {"eval_loss": 0.6, "eval_accuracy": 1.0}) is None
    assert saver.judge(2, {"eval_loss": 0.4, "eval_accuracy": 0.0})["value"] == 0.4


def test_the_size_of_a_state_is_known_before_it_is_written(service, tiny_model, tmp_path):
    for count, options in enumerate([{}, {"train_unembed": True, "rank": 32}]):
        trainer = service.create_lora_training_client(str(tiny_model), quantize=None, dtype="float32", **options)
        path = trainer.save_state(tmp_path / f"s{count}")
        size = sum(file.stat().st_size for file in path.iterdir())
        assert 0.9 * size < trainer.state_bytes < 1.1 * size


def test_too_small_a_disk_is_refused_before_training_with_bytes_and_folder(words, tmp_path, monkeypatch, capsys):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage(0, 0, 10 << 20))
    assert app.main(["run", *words(keep_last=3)]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path}/runs has 0.01 GiB free and the run may need" in err and "lower keep_last" in err
    assert not (tmp_path / "runs").exists() and "step 1/" not in err


def test_what_the_disk_needs_grows_with_what_is_kept_and_shrinks_with_what_is_there(tmp_path, monkeypatch):
    class Trainer:
        state_bytes = 3000

    from collections import namedtuple

    small = saving._SMALL_FILES
    free = namedtuple("usage", "free")
    config = Config(model="m", dataset="d", output_dir=str(tmp_path / "deep" / "er"), keep_last=4)

    def fits(count, **options):
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: free(count + small))
        try:
            check_disk(config, Trainer, **{"evaluated": False, **options})
        except CheckpointError:
            return False
        return True

    assert fits(5 * 3000 + 2000) and not fits(5 * 3000 + 1999)
    assert fits(6 * 3000 + 2000, evaluated=True) and not fits(6 * 3000 + 1999, evaluated=True)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "f").write_bytes(bytes(2500))
    run = SimpleNamespace(checkpoints=tmp_path)
    assert fits(5 * 3000 - 500, run=run) and not fits(5 * 3000 - 501, run=run)


@pytest.fixture
def full_disk(monkeypatch):
    """While `full` is true nothing can be written into a checkpoint folder."""
    state, real = {"full": False, "refused": 0}, Disk.write

    def write(self, fd, data):
        if state["full"]:
            state["refused"] += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, fd, data)

    monkeypatch.setattr(Disk, "write", write)
    return state


def test_a_full_disk_costs_a_checkpoint_and_no_training(words, the_run, full_disk, tmp_path, monkeypatch, capsys):
    flags = words(max_steps=6, save_every=1, keep_last=10, samples=0)
    assert app.main(["run", *flags, "--output-dir", str(tmp_path / "whole")]) == 0
    step, count = TrainingClient.optim_step, iter(range(1, 100))

    def optim_step(self, *args, **kwargs):
        full_disk["full"] = next(count) in (2, 3)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TrainingClient, "optim_step", optim_step)
    assert app.main(["run", *flags]) == 0
    err = capsys.readouterr().err
    assert err.count("NO CHECKPOINT: could not save") == 2 and "ENOSPC" in err and full_disk["refused"]
    run, (whole,) = the_run(), list_runs(tmp_path / "whole")
    assert names(run) == ["step-000001", "step-000004", "step-000005"]
    assert column(run, "loss") == column(whole, "loss") and len(column(run, "loss")) == 6


def test_a_disk_full_at_the_end_fails_the_run_and_resuming_finishes_it(words, the_run, full_disk, monkeypatch, capsys):
    step, count = TrainingClient.optim_step, iter(range(1, 100))

    def optim_step(self, *args, **kwargs):
        full_disk["full"] = next(count) == 4
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TrainingClient, "optim_step", optim_step)
    assert app.main(["run", *words(max_steps=4, save_every=1, samples=0)]) == 1
    assert "ENOSPC" in capsys.readouterr().err
    assert list_runs(the_run().path.parent)[0]._record["status"] in ("running", "failed")
    assert latest_valid(the_run().checkpoints).meta["extra"]["step"] == 3
    full_disk["full"] = False
    assert app.main(["run", "--resume", str(the_run().path)]) == 0
    assert the_run().status == "finished" and (the_run().adapter / "adapter_model.safetensors").is_file()


def test_rows_that_metrics_jsonl_cannot_take_are_kept_and_written_later(words, the_run, monkeypatch, capsys):
    from local_tinker import track

    real, calls = track.JsonlTracker._flush, iter(range(1, 100))

    def flush(self):
        if next(calls) in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self)

    monkeypatch.setattr(track.JsonlTracker, "_flush", flush)
    assert app.main(["run", *words(max_steps=5, samples=0)]) == 0
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert [row["step"] for row in the_run().metrics()] == [1, 2, 3, 4, 5]


def test_the_record_of_a_run_names_its_command_and_what_was_read(words, the_run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["local-tinker", "run", "--name", "two words"])
    assert app.main(["run", *words(max_steps=1, samples=0)]) == 0
    record = json.loads((the_run().path / "run.json").read_text())
    assert record["sessions"][0]["command"] == "local-tinker run --name 'two words'"
    assert record["status"] == "finished" and record["cause"] is None and record["git"] and record["versions"]["torch"]
