"""`sample`: what it is pointed at, what it is asked, what it prints."""

import io
import json

import pytest

from local_tinker.cli import app
from local_tinker.cli.target import find_target
from local_tinker.errors import CheckpointError, UsageError
from local_tinker.runs import Run
from local_tinker.sampling import SamplingClient


@pytest.fixture
def trained(tiny_model, service, tmp_path):
    """A run with an adapter that answers "fox" where the base does not, and a state folder."""
    root = tmp_path / "runs"
    run = Run.create(root, "mine", config={"loss": "sft"})
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=None, dtype="float32")
    row = {"messages": [{"role": "user", "content": "dog?"}, {"role": "assistant", "content": "the fox"}]}
    for _ in range(40):
        trainer.forward_backward([row])
        trainer.optim_step(learning_rate=5e-3)
    trainer.save_adapter(run.adapter, overwrite=True)
    trainer.save_state(run.checkpoints / "step-000060")
    run.finish("finished")
    return root, run


def ask(*words):
    return app.main(["sample", *map(str, words), "--temperature", "0", "--max-tokens", "12", "--quantize", "none"])


@pytest.fixture
def stdin(monkeypatch):
    def give(text):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return give


def test_a_run_its_id_its_folders_and_its_states_all_answer_as_trained(trained, capsys):
    root, run = trained
    for word in (
        run.path,
        run.adapter,
        run.checkpoints / "step-000060",
        run.id,
        run.id[:15],
        "mine",
        str(run.path)[:-2],
        "last",
    ):
        assert ask(word, "dog?", "--root", root) == 0
        assert capsys.readouterr().out == "the fox\n", word


def test_text_is_shown_as_it_comes_and_an_interrupt_leaves_it(tiny_model, monkeypatch, capsys):
    def stream(self, prompt, **settings):
        yield "the beg"
        assert capsys.readouterr().out == "the beg"
        yield "inning"
        raise KeyboardInterrupt

    monkeypatch.setattr(SamplingClient, "stream", stream)
    assert ask(tiny_model, "dog?") == 130
    assert capsys.readouterr().out == "inning\n"


def test_an_answer_that_was_cut_says_after_how_many_tokens(tiny_model, capsys):
    assert app.main(["sample", str(tiny_model), "dog?", "--max-tokens", "3", "--seed", "1", "--quantize", "none"]) == 0
    assert "(cut after 3 tokens; --max-tokens allows more)" in capsys.readouterr().err


def test_a_model_folder_answers_untrained(trained, tiny_model, capsys):
    assert ask(tiny_model, "dog?") == 0
    assert capsys.readouterr().out != "the fox\n"


@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_the_prompt_comes_from_a_pipe(trained, stdin, capsys, prompt):
    stdin("dog?\n")
    assert ask(trained[1].path, *prompt) == 0
    assert capsys.readouterr().out == "the fox\n"


def test_json_holds_tokens_and_logprobs_of_every_completion(trained, capsys):
    assert ask(trained[1].path, "dog?", "-n", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["text"] for each in found] == ["the fox", "the fox"] and found[0]["stop_reason"] == "stop"
    assert len(found[0]["tokens"]) == len(found[0]["logprobs"]) > 1


def test_raw_continues_text_and_a_seed_repeats_it(tiny_model, capsys):
    def once(*more):
        argv = ["sample", str(tiny_model), "the quick", "--max-tokens", "6", "--quantize", "none", *more]
        assert app.main(argv) == 0
        return capsys.readouterr()

    assert once("--raw", "--seed", "1").out == once("--raw", "--seed", "1").out != once("--raw", "--seed", "2").out
    assert once("--raw", "--seed", "1").out != once("--seed", "1").out


def test_filters_and_stop_texts_reach_the_sampler(trained, tiny_model, capsys):
    def drawn(*more):
        argv = [
            "sample",
            str(tiny_model),
            "the quick",
            "--raw",
            "--max-tokens",
            "6",
            "--quantize",
            "none",
            "--seed",
            "3",
        ]
        assert app.main([*argv, *more]) == 0
        return capsys.readouterr().out

    hot = ("--temperature", "50")
    assert drawn(*hot, "--top-k", "1") == drawn(*hot, "--min-p", "1") == drawn("--temperature", "0") != drawn(*hot)
    assert ask(trained[1].path, "dog?", "--stop", "never", "--stop", " fox") == 0
    assert capsys.readouterr().out == "the\n"


def test_a_system_message_is_put_before_the_question(tiny_model, capsys, service):
    assert ask(tiny_model, "dog?", "--system", "Bark.") == 0
    sampler = service.create_sampling_client(tiny_model, quantize=None)
    chat = [{"role": "system", "content": "Bark."}, {"role": "user", "content": "dog?"}]
    assert capsys.readouterr().out == sampler.sample(chat, temperature=0, max_tokens=12) + "\n"


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["nothing-like-it", "hi"], 2, "no model 'nothing-like-it'"),
        (["MODEL", " "], 2, "the prompt is empty"),
        (["MODEL", "hi", "--n", "0"], 2, "--n must be >= 1"),
        (["MODEL", "hi", "--raw", "--system", "x"], 2, "--system belongs to a chat"),
        (["MODEL", "hi", "--quantize", "3bit"], 2, "--quantize must be one of"),
        (["MODEL", "hi", "--top-p", "0"], 2, "top_p must be in (0, 1]"),
        (["MODEL", "hi", "--top-k", "-2"], 2, "top_k must be"),
        (["MODEL", "hi", "--min-p", "2"], 2, "min_p must be"),
        (["MODEL", "hi", "--max-tokns", "3"], 2, "did you mean --max-tokens?"),
    ],
)
def test_mistakes_are_said_in_one_line(tiny_model, capsys, words, code, says):
    assert app.main(["sample", *[str(tiny_model) if w == "MODEL" else w for w in words]]) == code
    out, err = capsys.readouterr()
    assert out == "" and says in err


def test_a_run_that_saved_nothing_and_an_ambiguous_start_are_named(tmp_path):
    first = Run.create(tmp_path, "a", config={})
    with pytest.raises(CheckpointError, match="has saved no adapter and no checkpoint"):
        find_target(first.id, tmp_path)
    Run.create(tmp_path, "a", config={})
    with pytest.raises(UsageError, match="means 2 runs"):
        find_target(first.id[:12], tmp_path)
    assert find_target("smollm2-135m", tmp_path) == "smollm2-135m"


def test_a_word_that_is_neither_run_nor_model_is_answered_with_the_run_meant(trained, capsys):
    root, run = trained
    for word, says in {
        "mime": f"no run 'mime' in {root}, and no model 'mime'",
        run.id.replace("mine", "mien"): f"Did you mean the run {run.id}?",
    }.items():
        assert ask(word, "dog?", "--root", root) == 2
        assert says in capsys.readouterr().err
    assert ask("last", "dog?", "--root", root / "absent") == 2
    assert "absent holds no runs)" in capsys.readouterr().err


def test_a_path_into_the_runs_is_no_hub_id(trained, monkeypatch, capsys):
    root, run = trained
    monkeypatch.chdir(root.parent)
    assert ask("runs/mien", "dog?") == 2
    assert f"no run 'mien' in runs; did you mean the run {run.id}?" in capsys.readouterr().err


def test_a_run_named_like_a_model_does_not_hide_the_model(tmp_path):
    Run.create(tmp_path, "qwen3-4b", config={}).finish("finished")
    assert find_target("qwen3-4b", tmp_path) == "qwen3-4b"


def test_a_folder_of_runs_is_said_to_be_one(trained, capsys):
    root, _ = trained
    assert ask(root, "dog?") == 2
    assert f"{root} is a folder of runs, not one of them" in capsys.readouterr().err
