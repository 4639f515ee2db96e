"""Which run a command continues, and that what is continued equals what was never stopped."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from local_tinker.checkpoint import latest_valid
from local_tinker.cli import app
from local_tinker.recipes import command, loop
from local_tinker.runs import Run, list_runs
from local_tinker.training import TrainingClient


@pytest.fixture
def stop_at(monkeypatch):
    """Ctrl-C after the n-th optimiser step from here, once."""

    def arrange(number, times=1):
        step, count = TrainingClient.optim_step, iter(range(1, 10_000))

        def optim_step(self, *args, **kwargs):
            result = step(self, *args, **kwargs)
            if next(count) == number:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return result

        monkeypatch.setattr(TrainingClient, "optim_step", optim_step)

    return arrange


def adapter(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(run):
    """Rows of the metrics without what a clock or the machine decides."""
    drop = ("time", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in row.items() if key not in drop} for row in run.metrics()]


def test_the_same_command_again_continues_an_unfinished_run_and_says_so(words, tmp_path, stop_at, capsys):
    flags = words(max_steps=5, samples=0)
    assert app.main(["run", *flags, "--output-dir", str(tmp_path / "whole")]) == 0
    stop_at(2)
    assert app.main(["run", *flags]) == 130
    (run,) = list_runs(tmp_path / "runs")
    capsys.readouterr()
    assert app.main(["run", *flags]) == 0
    err = capsys.readouterr().err
    assert f"{run.id} has this config and ended interrupted (Ctrl-C): continuing it; --fresh starts a new run" in err
    assert f"resuming {run.id} after step 2" in err
    (run,), (whole,) = list_runs(tmp_path / "runs"), list_runs(tmp_path / "whole")
    assert run.status == "finished" and same(adapter(run), adapter(whole)) and numbers(run) == numbers(whole)
    assert app.main(["run", *flags]) == 0  # finished: a third time is a new run
    assert [each.status for each in list_runs(tmp_path / "runs")] == ["finished", "finished"]


def test_fresh_starts_over_and_another_config_is_another_run(words, tmp_path, stop_at, capsys):
    flags = words(max_steps=3, samples=0)
    stop_at(1)
    assert app.main(["run", *flags]) == 130
    assert app.main(["run", *flags, "--seed", "5"]) == 0
    assert app.main(["run", *flags, "--fresh"]) == 0
    runs = list_runs(tmp_path / "runs")
    assert [run.status for run in runs] == ["interrupted", "finished", "finished"]
    assert len(runs[2].metrics()) == 3
    # a newer run of the config has finished: the older unfinished one is history, and is named
    capsys.readouterr()
    assert app.main(["run", *flags]) == 0 and len(list_runs(tmp_path / "runs")) == 4
    assert (
        f"{runs[0].id} of this config is interrupted: --resume {runs[0].id} goes on with it" in capsys.readouterr().err
    )
    assert app.main(["run", *flags, "--resume"]) == 0 and list_runs(tmp_path / "runs")[0].status == "finished"


def test_a_run_beside_one_of_the_same_config_says_so(words, tmp_path, capsys):
    flags = words(max_steps=1, samples=0)
    assert app.main(["run", *flags]) == 0
    (done,) = list_runs(tmp_path / "runs")
    with Run.create(tmp_path / "runs", "beside", config=done.config) as running:
        capsys.readouterr()
        assert app.main(["run", *flags]) == 0
        beside = f"{running.id} has this config and is running (process {os.getpid()}): this is another run beside it"
        assert beside in capsys.readouterr().err


def test_resume_without_a_word_finds_the_newest_unfinished_run(words, tmp_path, stop_at, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stop_at(2)
    assert app.main(["run", *words(max_steps=3, samples=0)]) == 130
    assert app.main(["run", "--resume"]) == 0
    (run,) = list_runs(tmp_path / "runs")
    assert run.status == "finished" and [row["step"] for row in run.metrics()] == [1, 2, 3]
    capsys.readouterr()
    assert app.main(["run", "--resume", "--output-dir", str(tmp_path / "runs")]) == 2
    assert "no unfinished run with a checkpoint in" in capsys.readouterr().err
    assert app.main(["run", "--resume", "--fresh"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_run_in_use_is_not_taken_by_a_second_process(words, tmp_path, stop_at, capsys):
    stop_at(1)
    assert app.main(["run", *words(max_steps=3, samples=0)]) == 130
    (run,) = list_runs(tmp_path / "runs")
    code = f"""if True:
        import sys, os
        from local_tinker.runs import Run
        run = Run.open({str(run.path)!r}).resume()
        print(os.getpid(), flush=True)
        sys.stdin.read()
    """
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        pid = other.stdout.readline().strip()
        capsys.readouterr()
        assert app.main(["run", "--resume", str(run.path)]) == 1
        err = capsys.readouterr().err
        assert f"is in use by process {pid} since" in err and "Traceback" not in err
    finally:
        other.communicate()
    assert app.main(["run", "--resume", str(run.path)]) == 0


def test_a_resumed_run_takes_over_the_cut_of_its_state_not_that_of_the_memory_free_now(
    words, tmp_path, stop_at, monkeypatch
):
    from local_tinker.engine import planning

    flags = words(max_steps=3, samples=0, dtype="bfloat16")
    assert app.main(["run", *flags, "--output-dir", str(tmp_path / "whole")]) == 0
    stop_at(1)
    assert app.main(["run", *flags]) == 130
    real = planning.plan_budget

    def elsewhere(model, spec, *, micro_batch_tokens, fp8):
        return real(model, spec, micro_batch_tokens=micro_batch_tokens or 24)

    monkeypatch.setattr("local_tinker.engine.local.plan_budget", elsewhere)
    assert app.main(["run", *flags]) == 0
    (run,), (whole,) = list_runs(tmp_path / "runs"), list_runs(tmp_path / "whole")
    assert same(adapter(run), adapter(whole)) and numbers(run) == numbers(whole)


def test_an_evaluation_that_was_cut_off_is_made_up_for(words, tmp_path, monkeypatch):
    flags = words(max_steps=4, eval_every=2, eval_fraction=0.2, samples=0)
    assert app.main(["run", *flags, "--output-dir", str(tmp_path / "whole")]) == 0
    forward, count = TrainingClient.forward, iter(range(100))

    def cut_off(self, *args, **kwargs):
        if next(count) == 1:
            raise RuntimeError("a failing evaluation")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TrainingClient, "forward", cut_off)
    with pytest.raises(RuntimeError):
        app.main(["run", *flags])
    assert app.main(["run", *flags]) == 0
    (run,), (whole,) = list_runs(tmp_path / "runs"), list_runs(tmp_path / "whole")
    assert numbers(run) == numbers(whole) and [row.get("eval_loss") for row in numbers(run)].count(None) == 4


def test_a_policy_step_cut_between_its_updates_is_not_saved_and_done_again(words, tmp_path, stop_at, capsys):
    own = dict(dataset="arithmetic", limit=8, max_tokens=6, samples=0, batch_size=2, ppo_epochs=2, minibatches=2)
    flags = ["--loss", "ppo", *words(**own, save_every=1)]
    assert app.main(["run", *flags, "--output-dir", str(tmp_path / "whole")]) == 0
    stop_at(6, times=2)  # the second of the four updates of step 2
    assert app.main(["run", *flags]) == 130
    assert "stopped in the middle of step 2: its updates are not part of any checkpoint" in capsys.readouterr().err
    (run,) = list_runs(tmp_path / "runs")
    assert latest_valid(run.checkpoints).meta["extra"]["step"] == 1
    assert app.main(["run", *flags]) == 0
    (run,), (whole,) = list_runs(tmp_path / "runs"), list_runs(tmp_path / "whole")
    assert numbers(run) == numbers(whole) and same(adapter(run), adapter(whole))


def test_a_closed_terminal_saves_like_ctrl_c_unless_nohup_said_otherwise(words, tmp_path, monkeypatch):
    step, before = TrainingClient.optim_step, signal.getsignal(signal.SIGHUP)

    def optim_step(self, *args, **kwargs):
        signal.raise_signal(signal.SIGHUP)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TrainingClient, "optim_step", optim_step)
    assert app.main(["run", *words(max_steps=3, samples=0)]) == 130
    (run,) = list_runs(tmp_path / "runs")
    assert (run.status, run.cause) == ("interrupted", "SIGHUP") and run.latest_checkpoint().meta["step"] == 1
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert app.main(["run", *words(max_steps=3, samples=0)]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert list_runs(tmp_path / "runs")[0].status == "finished"


def test_a_terminal_that_is_gone_stops_nothing(words, tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = isatty = lambda self: False

    monkeypatch.setattr(sys, "stderr", Gone())
    assert app.main(["run", *words(max_steps=2, samples=0)]) == 0
    assert list_runs(tmp_path / "runs")[0].status == "finished"


def test_more_steps_than_the_epochs_have_go_round_again_and_are_announced(words, the_run, capsys):
    assert app.main(["run", *words(max_steps=7, samples=0, schedule="linear")]) == 0
    assert "max_steps=7 is more than the 3 steps of epochs=1: 3 passes" in capsys.readouterr().err
    rows = the_run().metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7] and rows[-1]["epoch"] == pytest.approx(7 / 3)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01 * (1 - i / 7) for i in range(7)])


@pytest.mark.parametrize(
    "changes", [dict(dataset="absent.jsonl"), dict(model="smolm2"), dict(model="./no/where"), dict(report_to="wandbb")]
)
def test_a_mistake_is_said_before_the_config_is_printed(words, capsys, changes):
    assert app.main(["run", *words(**changes)]) in (2, 3)
    assert capsys.readouterr().out == ""


def test_a_run_without_its_checkpoints_is_not_continued_unasked(words, tmp_path):
    config = command.parse(words(), environ={}).config
    from local_tinker.recipes.config import resolved

    Run.create(tmp_path / "runs", "x", config=resolved(config, "sft")).finish("failed", "early")
    assert app.main(["run", *words(samples=0)]) == 0
    assert [run.status for run in list_runs(tmp_path / "runs")] == ["failed", "finished"]


def test_what_is_named_first_and_last_spans_a_resumed_run(words, tmp_path, stop_at, capsys):
    stop_at(1)
    assert app.main(["run", *words(max_steps=3, samples=0)]) == 130
    (run,) = list_runs(tmp_path / "runs")
    first = run.metrics()[0]["loss"]
    assert app.main(["run", *words(max_steps=3, samples=0)]) == 0
    assert f"finished after 3 steps: loss {first:.4f} ->" in capsys.readouterr().out
    assert len(json.loads((run.path / "run.json").read_text())["sessions"]) == 2


def test_loop_counts_what_is_skipped_across_a_resume(words, tmp_path, monkeypatch, capsys):
    """Two bad steps before a kill and one after it are three in a row."""
    forward_backward, count = TrainingClient.forward_backward, iter(range(1, 100))

    def poisoned(self, *args, **kwargs):
        result = forward_backward(self, *args, **kwargs)
        if next(count) >= 2:
            window = self._engine._trainer(self._id).window
            next(iter(window.buffers.values()))[3] = float("nan")
        return result

    monkeypatch.setattr(TrainingClient, "forward_backward", poisoned)
    real = loop.Session._finish_step

    def stop_after_three(self):
        real(self)
        if self.step == 3 and self._skipped == 2 and len(self.run.record["sessions"]) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Session, "_finish_step", stop_after_three)
    assert app.main(["run", *words(max_steps=9, samples=0)]) == 130
    (run,) = list_runs(tmp_path / "runs")
    at_first = {k: v for k, v in load_file(run.adapter / "adapter_model.safetensors").items()}
    assert app.main(["run", *words(max_steps=9, samples=0)]) == 1
    err = capsys.readouterr().err
    assert "3 steps in a row had a gradient that is not finite; the last batch was rows.jsonl line" in err
    (run,) = list_runs(tmp_path / "runs")
    assert [row["skipped"] for row in run.metrics()] == [0, 1, 1, 1] and run.status == "failed"
    assert latest_valid(run.checkpoints).meta["extra"]["step"] == 4 and latest_valid(run.checkpoints).meta["step"] == 1
    assert same(adapter(run), at_first)


def test_a_run_is_resumed_by_name_in_the_folder_given(words, tmp_path, stop_at, monkeypatch, capsys):
    stop_at(1)
    assert app.main(["run", *words(max_steps=2, samples=0, name="mine")]) == 130
    monkeypatch.chdir(tmp_path.parent)
    root = str(tmp_path / "runs")
    assert app.main(["run", "--resume", "mine"]) == 2  # not where we stand
    assert app.main(["run", "--resume", "mine", "--output-dir", root, "--rank", "2"]) == 2
    assert "leave --rank away" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_TINKER_OUTPUT_DIR", root)
    assert command.parse(["--resume"]).resume == command.parse(["--resume", "mine"]).resume
    monkeypatch.delenv("LOCAL_TINKER_OUTPUT_DIR")
    assert app.main(["run", "--resume", "mine", "--output-dir", root]) == 0
    (run,) = list_runs(root)
    assert run.status == "finished" and len(run.metrics()) == 2
    capsys.readouterr()
    # said before anything is read or loaded
    assert app.main(["run", "--resume", str(run.path)]) == 2
    said = capsys.readouterr()
    assert f"run {run.id} is finished: there is nothing to resume" in said.err and not said.out
