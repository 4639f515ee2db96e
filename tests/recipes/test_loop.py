"""A whole run on a tiny model: its folder, resuming bit for bit, interrupts, failures, evaluation."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from local_tinker.checkpoint import latest_valid
from local_tinker.cli import app
from local_tinker.errors import StateError
from local_tinker.recipes import command, loop
from local_tinker.training import TrainingClient
from local_tinker.types import LossResult, StepResult


def adapter_of(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run):
    return [row["loss"] for row in run.metrics() if "loss" in row]


@pytest.fixture
def after_step(monkeypatch):
    """Does something right after the n-th optimiser step has been applied."""

    def arrange(number, act):
        step, count = TrainingClient.optim_step, iter(range(1, 1000))

        def optim_step(self, *args, **kwargs):
            result = step(self, *args, **kwargs)
            if next(count) == number:
                act()
            return result

        monkeypatch.setattr(TrainingClient, "optim_step", optim_step)

    return arrange


def test_a_run_leaves_a_folder_that_says_what_ran(words, the_run, capsys, rows_file):
    assert app.main(["run", *words(epochs=2)]) == 0
    run = the_run()
    assert run.status == "finished" and run.config["learning_rate"] == 0.01 and run.config["loss"] == "sft"
    assert list(run.record["data"]) == [str(rows_file)] and len(run.record["data"][str(rows_file)]) == 64
    assert run.record["seeds"] == {"seed": 42} and run.record["versions"]["torch"]
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert losses(run)[-1] < losses(run)[0]
    out = capsys.readouterr().out
    assert "memory plan:" in out and "[[" in out and "finished after 6 steps: loss" in out
    assert f"next: local-tinker chat {run.path}" in out


def test_the_adapter_of_a_run_gives_equal_logits_in_plain_peft(words, the_run, tiny_model, service):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert app.main(["run", *words(samples=0)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, the_run().adapter)
    sampler = service.create_sampling_client(the_run().adapter)
    ids = sampler.prompt_tokens([{"role": "user", "content": "the fox"}])
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    assert sampler.compute_logprobs(ids)[1:] == pytest.approx(wanted, abs=2e-5)


def test_a_dry_run_prints_config_plan_and_preflight_and_writes_nothing(words, tmp_path, capsys):
    assert app.main(["run", *words(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in (
        "learning_rate       0.01",
        "choice: micro-batches of",
        "rows: 10 kept",
        "10 of 10",
        "[[two three<|im_end|>]]",
    ):
        assert text in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("schedule", [dict(schedule="cosine", warmup=2)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    words, tmp_path, after_step, capsys, schedule
):
    flags = words(epochs=3, samples=0, eval_fraction=0.2, eval_every=2, **schedule)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert app.main(["run", *flags, "--output-dir", str(whole)]) == 0
    after_step(4, lambda: signal.raise_signal(signal.SIGINT))
    assert app.main(["run", *flags, "--output-dir", str(stopped)]) == 130
    (run,) = loop_runs(stopped)
    assert (run.status, run.cause) == ("interrupted", "Ctrl-C") and len(losses(run)) == 4
    assert latest_valid(run.checkpoints).meta["extra"]["step"] == 4
    assert f"local-tinker run --resume {run.path}" in capsys.readouterr().err
    assert app.main(["run", *flags, "--output-dir", str(stopped), "--resume"]) == 0
    (run,), (other,) = loop_runs(stopped), loop_runs(whole)
    assert run.status == "finished" and losses(run) == losses(other) and len(losses(run)) == 6
    assert [row.get("eval_loss") for row in run.metrics()] == [row.get("eval_loss") for row in other.metrics()]
    assert same(adapter_of(run), adapter_of(other))


def loop_runs(root):
    from local_tinker.runs import list_runs

    return list_runs(root)


def test_a_run_is_resumed_by_its_folder_from_its_last_checkpoint(words, tmp_path, after_step, the_run):
    flags = words(epochs=2, samples=0, save_every=2)

    def fail():
        raise RuntimeError("a bug in a reward function")

    after_step(3, fail)
    with pytest.raises(RuntimeError):
        app.main(["run", *flags])
    run = the_run()
    assert run.status == "failed" and "a bug" in run.cause
    assert [each.name for each in sorted(run.checkpoints.iterdir())] == ["step-000002", "step-000003"]
    assert app.main(["run", "--resume", str(run.path)]) == 0
    assert the_run().status == "finished" and len(losses(the_run())) >= 5
    assert app.main(["run", "--resume", str(run.path)]) == 2  # it is finished


def test_a_second_interrupt_stops_at_once_and_still_saves_a_loadable_state(
    words, the_run, monkeypatch, service, after_step
):
    begin = TrainingClient.forward_backward
    calls = iter(range(1, 100))

    def forward_backward(self, *args, **kwargs):
        result = begin(self, *args, **kwargs)
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(TrainingClient, "forward_backward", forward_backward)
    assert app.main(["run", *words(epochs=2)]) == 130
    state = latest_valid(the_run().checkpoints)
    assert state.meta["extra"]["step"] == 2 and state.meta["step"] == 2
    assert service.create_training_client_from_state(state.path).step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_between_a_step_and_its_bookkeeping_does_not_use_the_batch_twice(words, the_run, after_step):
    after_step(2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    assert app.main(["run", *words(epochs=2)]) == 130
    state = latest_valid(the_run().checkpoints)
    assert state.meta["extra"]["step"] == state.meta["step"] == 2 and state.meta["extra"]["batches"]["position"] == 2


def test_sigterm_saves_like_ctrl_c(words, the_run, after_step):
    after_step(1, lambda: signal.raise_signal(signal.SIGTERM))
    assert app.main(["run", *words(epochs=2)]) == 130
    assert (the_run().status, the_run().cause) == ("interrupted", "SIGTERM")
    assert latest_valid(the_run().checkpoints).meta["extra"]["step"] == 1


def test_three_steps_in_a_row_that_are_not_finite_end_the_run_and_name_the_batch(words, the_run, monkeypatch, capsys):
    step = TrainingClient.optim_step
    skip = iter([False, True, True, False, True, True, True, False, False])

    def optim_step(self, params):
        if next(skip):
            self._engine.discard_gradients(self._id)
            return StepResult(lambda: (float("nan"), True, self.step))
        return step(self, params)

    monkeypatch.setattr(TrainingClient, "optim_step", optim_step)
    assert app.main(["run", *words(epochs=4)]) == 1
    err = capsys.readouterr().err
    assert "error: 3 steps in a row" in err and "rows.jsonl line" in err
    assert the_run().status == "failed" and latest_valid(the_run().checkpoints).meta["extra"]["step"] == 7
    assert the_run().metrics()[1]["skipped"] == 1


def test_old_checkpoints_give_way_to_new_ones(words, the_run):
    assert app.main(["run", *words(epochs=3, save_every=1, keep_last=2, samples=0)]) == 0
    assert sorted(path.name for path in the_run().checkpoints.iterdir()) == ["step-000007", "step-000008"]


def test_the_evaluation_is_the_loss_a_token_over_all_held_out_rows(words, the_run, tmp_path, service, tiny_model):
    from local_tinker import load_rows

    held = tmp_path / "held.jsonl"
    from tests.recipes.conftest import chat

    held.write_text(
        "".join(json.dumps(chat(q, a)) + "\n" for q, a in [("0", "1"), ("the fox", "jumps over the lazy dog")])
    )
    assert app.main(["run", *words(eval_dataset=held, max_steps=1)]) == 0
    fresh = service.create_lora_training_client(str(tiny_model), rank=4, quantize=None, dtype="float32")
    lines = the_run().metrics()
    assert lines[0] == {
        "step": 0,
        "time": lines[0]["time"],
        "eval_loss": pytest.approx(float(fresh.forward(load_rows(held)))),
    }
    assert lines[-1]["step"] == 1 and lines[-1]["eval_loss"] != lines[0]["eval_loss"]
    assert len(the_run().record["data"]) == 2


@pytest.mark.parametrize(
    "changes, code, says",
    [
        (dict(dataset="absent.jsonl"), 2, "absent.jsonl"),
        (dict(eval_fraction=0.01), 2, "eval_fraction=0.01 of 10 rows holds out 0"),
        (dict(eval_fraction=0.2, eval_dataset="x"), 2, "give one of them"),
        (dict(max_length=3), 2, "nothing left to train on: 10 rows dropped as too long"),
        (dict(report_to="wandbb"), 2, "no tracker 'wandbb', did you mean wandb?"),
        (dict(model="no/where/here"), 3, "no/where/here"),
        (dict(limit=0), 2, "limit=0 keeps no row; give a number of rows, or -1 for all"),
        (dict(max_length=100000), 2, "the model's context of 256"),
    ],
)
def test_mistakes_end_the_run_before_it_begins(words, capsys, changes, code, says, tmp_path):
    assert app.main(["run", *words(**changes)]) == code
    assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_an_empty_dataset_is_said_to_be_empty(words, tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text("\n\n")
    assert app.main(["run", *words(dataset=tmp_path / "none.jsonl")]) == 2
    assert "no examples" in capsys.readouterr().err


def test_resume_without_an_unfinished_run_is_refused(words, capsys, tmp_path):
    assert app.main(["run", *words(), "--resume"]) == 2
    assert "no unfinished run of this config" in capsys.readouterr().err
    assert app.main(["run", "--resume", "2020"]) == 2


def test_a_run_without_a_checkpoint_cannot_be_resumed(words, the_run, monkeypatch):
    assert app.main(["run", *words(samples=0, max_steps=1)]) == 0
    run = the_run()
    record = {**run._record, "status": "interrupted"}
    (run.path / "run.json").write_text(json.dumps(record))
    job = command.parse(["--resume", str(run.path)], environ={})
    with pytest.raises(StateError, match="no whole checkpoint"):
        command.execute(job)


def test_a_batch_of_more_rows_than_there_are_is_said(words, capsys):
    assert app.main(["run", *words(batch_size=400, samples=0)]) == 0
    said = capsys.readouterr().err
    assert "batch_size=400 is more than the 10 rows: a step takes them all" in said and "1 step of 10 rows" in said


def test_the_run_is_named_after_loss_and_model():
    from local_tinker.recipes.sft import Config

    assert loop.run_name(Config(model="meta-llama/Llama 3.2", dataset="d"), "sft") == "sft-Llama-3.2"
    assert loop.run_name(Config(model="/a/b/..", dataset="d", name="mine"), "sft") == "mine"


def test_log_must_be_called_in_the_body(words, service, tmp_path, tiny_model, rows_file):
    from local_tinker import batches, load_rows
    from local_tinker.recipes.data import Data
    from local_tinker.recipes.sft import Config

    config = Config(
        model=str(tiny_model), dataset=str(rows_file), output_dir=str(tmp_path / "runs"), quantize="none", rank=4
    )
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=None, dtype="float32")
    rows = load_rows(rows_file)
    with pytest.raises(AssertionError, match="calls session.log once a step"):
        with loop.Session(
            config, trainer, batches(rows, batch_size=5), Data(rows, rows[:0], {}), loss="sft"
        ) as session:
            for _ in session:
                pass


def test_numbers_of_a_step_count_the_tokens_of_every_datum(words, the_run, tiny_model, service, rows_file):
    from local_tinker import load_rows

    assert app.main(["run", *words(samples=0, batch_size=10)]) == 0
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=None, dtype="float32")
    tokens = sum(len(trainer.renderer.conversation(row["messages"]).tokens) - 1 for row in load_rows(rows_file))
    (line,) = the_run().metrics()
    assert line["tokens"] == tokens and line["epoch"] == 1.0 and line["learning_rate"] == 0.01
    assert isinstance(trainer.forward(load_rows(rows_file)), LossResult)
