"""dpo, grpo and ppo as recipes on a tiny model: they run, learn what they should, and resume exactly."""

import math
import signal

import pytest
import torch
from safetensors.torch import load_file

from local_tinker.cli import app
from local_tinker.errors import UsageError
from local_tinker.recipes.arithmetic import arithmetic
from local_tinker.recipes.data import columns_of, prompt_of, question_of
from local_tinker.recipes.ppo import Config as PpoConfig
from local_tinker.recipes.ppo import parts
from local_tinker.recipes.scoring import REWARDS, find_reward, mean_reward
from local_tinker.rewards import number_match, reward

POLICY = dict(dataset="arithmetic", limit=8, max_tokens=6, samples=0, batch_size=2)


def column(run, name):
    return [row[name] for row in run.metrics() if name in row]


def test_dpo_begins_at_ln_2_and_learns_the_pairs(words, the_run, pairs_file, capsys):
    assert app.main(["run", "--loss", "dpo", *words(dataset=pairs_file, epochs=3, eval_fraction=0.2)]) == 0
    run = the_run()
    assert column(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert column(run, "loss")[-1] < 0.6 and column(run, "accuracy")[-1] == 1.0
    assert len(column(run, "eval_accuracy")) == 2
    assert "loss 0.6931 ->" in capsys.readouterr().out


@pytest.fixture
def own_reward(tmp_path):
    """A reward function in a file, of which every answer earns something else."""
    path = tmp_path / "mine.py"
    path.write_text("def score(completion, answer):\n    return sum(map(ord, completion)) % 7 / 6\n\nother = 3\n")
    return f"{path}:score"


@pytest.mark.parametrize("loss, own", [("grpo", dict(group_size=4)), ("ppo", dict(ppo_epochs=2, minibatches=2))])
def test_policy_recipes_run_and_log_their_rewards(words, the_run, loss, own, own_reward):
    flags = words(**POLICY, reward=own_reward, eval_fraction=0.25, **own)
    assert app.main(["run", "--loss", loss, *flags]) == 0
    run = the_run()
    assert len(column(run, "reward_mean")) == 3 and all(0 <= value <= 1 for value in column(run, "reward_mean"))
    assert len(set(column(run, "reward_mean"))) > 1 and max(column(run, "grad_norm")) > 0
    assert len(column(run, "eval_reward")) == 2
    assert run.config["reward"] == own_reward and run.status == "finished"
    assert (run.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("loss, own", [("grpo", dict(group_size=4)), ("ppo", dict(ppo_epochs=1, minibatches=1))])
def test_the_first_step_is_on_policy_at_every_temperature(words, the_run, loss, own, own_reward, temperature):
    flags = words(**POLICY | dict(max_steps=1), reward=own_reward, temperature=temperature, dtype="float32", **own)
    assert app.main(["run", "--loss", loss, *flags]) == 0
    for name in ("ratio_mean", "ratio_max"):
        assert column(the_run(), name)[0] == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
@pytest.mark.parametrize("name, value", [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1)])
def test_policy_recipes_draw_from_the_whole_distribution(words, capsys, loss, name, value):
    assert app.main(["run", "--loss", loss, *words(**POLICY, **{name: value})]) == 2
    assert f"--{name.replace('_', '-')}" in capsys.readouterr().err


@pytest.mark.parametrize("loss, own", [("grpo", dict(group_size=4)), ("ppo", dict(ppo_epochs=2, minibatches=2))])
def test_a_resumed_policy_run_equals_an_uninterrupted_one(words, tmp_path, monkeypatch, own_reward, loss, own):
    from local_tinker.recipes.loop import Session
    from local_tinker.runs import list_runs

    flags = ["--loss", loss, *words(**POLICY, reward=own_reward, **own)]
    assert app.main(["run", *flags, "--output-dir", str(tmp_path / "whole")]) == 0
    log, calls = Session.log, iter(range(1, 100))

    def interrupted(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Session, "log", interrupted)
    assert app.main(["run", *flags, "--output-dir", str(tmp_path / "cut")]) == 130
    assert app.main(["run", *flags, "--output-dir", str(tmp_path / "cut"), "--resume"]) == 0
    (whole,), (cut,) = list_runs(tmp_path / "whole"), list_runs(tmp_path / "cut")
    assert column(whole, "reward_mean") == column(cut, "reward_mean")
    a, b = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_dry_run_of_a_policy_shows_a_prompt_and_the_rewards_columns(words, capsys):
    assert app.main(["run", "--loss", "grpo", *words(**POLICY), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        "prompts: 8," in out
        and "columns for the reward: answer" in out
        and "Answer with the number only.<|im_end|>\n" in out
    )


def test_prompts_that_leave_no_room_are_refused(words, capsys):
    assert app.main(["run", "--loss", "grpo", *words(**POLICY | {"max_tokens": 250})]) == 2
    assert "no prompt leaves room for an answer" in capsys.readouterr().err


def test_the_arithmetic_is_right_seeded_and_checked_by_its_verifier():
    rows = arithmetic(50, 3)
    assert (
        [dict(row) for row in rows]
        == [dict(row) for row in arithmetic(50, 3)]
        != [dict(row) for row in arithmetic(50, 4)]
    )
    for row in rows:
        question = prompt_of(row)[0]["content"].removeprefix("What is ").split("?")[0]
        assert eval(question) == int(row["answer"]) >= 0
        assert number_match(f"It is {row['answer']}.", **{k: v[0] for k, v in columns_of([row]).items()}) == 1.0


def test_rewards_are_found_by_name_and_in_files(tmp_path, own_reward):
    assert find_reward("number_match")("p", ["the answer is 12", "13"], answer="12") == [1.0, 0.0]
    assert find_reward(own_reward)("p", "a", answer="") == pytest.approx(97 % 7 / 6)
    for name, says in {
        "numbr_match": "did you mean number_match",
        f"{tmp_path}/absent.py:f": "is not there",
        own_reward.replace("score", "scor"): "did you mean score",
        own_reward.replace("score", "other"): "has no function 'other'",
    }.items():
        with pytest.raises(UsageError, match=says):
            find_reward(name)
    assert set(REWARDS) == {"number_match", "exact_match", "math_match"}


def test_a_ppo_pass_uses_every_answer_once_in_a_new_order():
    config = PpoConfig(model="m", dataset="d", ppo_epochs=2, minibatches=3)
    made = list(parts(8, config, 5))
    assert [len(part) for part in made] == [3, 3, 2, 3, 3, 2]
    first, second = sum(made[:3], []), sum(made[3:], [])
    assert sorted(first) == sorted(second) == list(range(8)) and first != second
    assert made == list(parts(8, config, 5)) != list(parts(8, config, 6))


@pytest.mark.parametrize(
    "row, loss, asked",
    [
        ({"prompt": "a", "completion": "b"}, "sft", ("a", "b")),
        ({"text": "x" * 60}, "sft", ("x" * 48, "x" * 12)),
        ({"instruction": "do", "output": "done"}, "sft", ([{"role": "user", "content": "do"}], "done")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo", ("a", "b")),
        ({"question": "q", "answer": "4"}, "grpo", ([{"role": "user", "content": "q"}], "4")),
    ],
)
def test_what_is_asked_at_the_end_is_the_prompt_of_the_row(row, loss, asked):
    assert question_of(row, loss) == asked


def test_the_mean_reward_of_an_evaluation_is_that_of_the_likeliest_answers(tiny_model, service, own_reward):
    rows = arithmetic(5, 1)
    trainer = service.create_lora_training_client(str(tiny_model), rank=2, quantize=None, dtype="float32")
    sampler = trainer.save_weights_and_get_sampling_client()
    answers = [sampler.sample(row["prompt"], temperature=0, max_tokens=6) for row in rows]
    scores = [sum(map(ord, answer)) % 7 / 6 for answer in answers]
    assert mean_reward(trainer, find_reward(own_reward), rows, max_tokens=6) == pytest.approx(sum(scores) / 5)

    def some(completions, **columns):
        return [1.0, None, 0.5, None, None]

    assert mean_reward(trainer, reward(some), rows, max_tokens=6) == 0.75
