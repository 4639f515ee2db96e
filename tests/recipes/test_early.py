"""What is wrong is said before anything is printed or loaded; and columns under other names."""

import json

import pytest

from local_tinker.cli import app
from local_tinker.data.rows import Row, Rows, RowSource
from local_tinker.errors import DatasetError, UsageError
from local_tinker.recipes import early
from local_tinker.recipes.data import renamed
from local_tinker.runs import Run


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (dict(report_to="wandb"), 3, "the wandb tracker needs wandb, which is not installed: pip install wandb"),
        (dict(output_dir="rows.jsonl/runs"), 2, "rows.jsonl is not a folder; name another output_dir"),
        (dict(name="a/b"), 2, "got the name 'a/b': a name is 1 to 128 of"),
        (
            dict(model="some-run"),
            2,
            "model 'some-run' is a run, which holds an adapter: name its base model, smollm2-135m",
        ),
        (dict(loss="dpo"), 2, "rows.jsonl, line 1: no shape for loss 'dpo' among the columns messages"),
        (dict(loss="grpo", max_tokens=256), 2, "max_tokens=256 leaves no room for a prompt in the context of"),
        (dict(loss="grpo", max_tokens=9, max_length=9), 2, "leaves no room for a prompt in max_length, 9 tokens"),
        (dict(loss="grpo", max_tokens=8), 2, "reward function number_match needs 'answer', which is no column"),
        (dict(loss="grpo", max_tokens=8, reward="bad.py:f"), 2, "the reward file 'bad.py' cannot be read: SyntaxError"),
        (dict(dataset="arithmetik"), 2, "arithmetik: no such file or folder here, and the hub id could not be loaded"),
        (dict(dataset="arithmetik"), 2, ", did you mean arithmetic?"),
    ],
)
def test_a_mistake_is_said_before_the_config_is_shown(words, tmp_path, monkeypatch, capsys, changes, code, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("def f(:\n")
    Run.create(tmp_path / "past", "x", config={"model": "smollm2-135m"}).path.rename(tmp_path / "some-run")
    assert app.main(["run", *words(**changes)]) == code
    said = capsys.readouterr()
    assert says in said.err and said.out == "" and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"note": "x"}, "no shape for loss 'sft'"),
        ({"text": "x"}, "mixed rows: the rows before are messages, this one is text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message to train on"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_before_the_config_is_shown(words, rows_file, capsys, row, says):
    rows_file.write_text(rows_file.read_text() + json.dumps(row) + "\n")
    assert app.main(["run", *words()]) == 2
    said = capsys.readouterr()
    assert "rows.jsonl, line 11" in said.err and says in said.err and said.out == ""


def test_bad_rows_that_are_allowed_are_left_to_the_preflight(words, rows_file):
    rows_file.write_text(rows_file.read_text() + '{"note": "x"}\n')
    assert app.main(["run", *words(max_bad=1), "--dry-run"]) == 0


def test_a_folder_that_cannot_be_written_holds_no_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} cannot be written"):
        early.check_folder(str(tmp_path / "a" / "b"))


def rows(*values):
    return Rows([Row(value, source=RowSource("f", i)) for i, value in enumerate(values, 1)], name="f")


def test_columns_are_read_under_our_names_and_the_others_stay():
    found = renamed(rows({"q": "1", "prompt": "2", "z": 3}, {"q": "4"}), "prompt = q, completion=prompt")
    assert list(found) == [{"prompt": "1", "completion": "2", "z": 3}, {"prompt": "4"}]
    assert [row.source.line for row in found] == [1, 2]


@pytest.mark.parametrize(
    ("columns", "error", "says"),
    [
        ("prompt:q", UsageError, "write pairs of our name and yours"),
        ("a=q,a=z", UsageError, "write pairs"),
        ("a=q,b=q", UsageError, "write pairs"),
        ("prompt=qu", DatasetError, "no row has 'qu'.*; there are q, z"),
        ("z=q", DatasetError, "'z' is a column already; map it too"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(columns, error, says):
    with pytest.raises(error, match=says):
        renamed(rows({"q": "1", "z": 3}), columns)


def test_a_recipe_trains_on_columns_of_other_names(words, tmp_path, capsys):
    path = tmp_path / "named.jsonl"
    path.write_text("".join(json.dumps({"ask": [{"role": "user", "content": "one"}], "reply": [
        {"role": "assistant", "content": "two"}]}) + "\n" for _ in range(4)))  # fmt: skip
    assert app.main(["run", *words(dataset=path)]) == 2
    assert "--columns " in capsys.readouterr().err
    config = tmp_path / "c.yaml"
    config.write_text("columns: {prompt: ask, completion: reply}\ntarget_modules: [q_proj, v_proj]\n")
    assert app.main(["run", *words(dataset=path), "--config", str(config), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "read as prompt+completion" in said.err and "q_proj,v_proj" in said.out
