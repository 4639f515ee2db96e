"""`quickstart` on a tiny model: the data that ships, before and after, the next command."""

import json

from local_tinker import load_rows
from local_tinker.cli import app, quickstart
from local_tinker.recipes.shipped import shipped
from local_tinker.runs import list_runs


def test_it_shows_answers_before_and_after_and_where_the_adapter_is(tiny_model, tmp_path, capsys):
    assert app.main(["quickstart", "--model", str(tiny_model), "--steps", "3", "--output-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    (run,) = list_runs(tmp_path)
    before, after = out.index("Before"), out.index("After")
    for prompt in quickstart.PROMPTS:
        assert before < out.index(f"> {prompt}") < after < out.rindex(f"> {prompt}")
    assert f"local-tinker chat {run.path}" in out and "step 3/3  loss" in err
    assert run.status == "finished" and (run.adapter / "adapter_model.safetensors").is_file()
    first, last = (row["eval_loss"] for row in run.metrics() if "eval_loss" in row)
    assert last < first and f"held-out loss {first:.2f} -> {last:.2f} in 3 steps" in out


def test_the_held_out_questions_are_not_among_the_trained_ones():
    def questions(name):
        return {m["content"] for row in load_rows(shipped(name)) for m in row["messages"] if m["role"] == "user"}

    trained, held = questions(quickstart.DATASET), questions(quickstart.HELD_OUT)
    assert not trained & held and "What is the capital of Italy?" in held - trained
    assert len(load_rows(shipped(quickstart.DATASET))) >= 50


def test_every_shipped_answer_ends_the_same_way_and_is_short():
    for name in (quickstart.DATASET, quickstart.HELD_OUT):
        for row in load_rows(shipped(name)):
            answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
            assert answers and all(a.endswith(" Tick tock.") and len(a) < 100 for a in answers), json.dumps(row)


def test_the_shipped_pairs_prefer_the_short_answer():
    rows = load_rows(shipped("data/concise_pairs.jsonl"))
    assert len(rows) == 80 and len({json.dumps(row["prompt"]) for row in rows}) == 80
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert rejected.endswith(chosen) and len(rejected) > 3 * len(chosen)
