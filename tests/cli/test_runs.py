"""The `runs` command: list, show and compare, as a user types them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from local_tinker.checkpoint import write_folder
from local_tinker.cli.runs import runs
from local_tinker.errors import CheckpointError, UsageError
from local_tinker.runs import Run
from local_tinker.track import JsonlTracker, TrackedRun


@pytest.fixture
def history(tmp_path):
    """A root with a finished and a failed run."""
    made = []
    for name, rank, losses in (("alpha", 8, [2.0, 0.123456789]), ("beta", 16, [2.0, math.nan])):
        run = Run.create(tmp_path / "runs", name, config={"rank": rank, "lr": 0.1}, seeds={"sampler": 7})
        tracker = JsonlTracker(TrackedRun(run.path))
        for step, loss in enumerate(losses, start=1):
            tracker.log(step, {"loss": loss})
        tracker.close()
        write_folder(run.checkpoints / "step-2", {"f": b"1"}, meta={"step": 2})
        made.append(run)
    made[0].note(best={"step": 1, "metric": "eval_loss", "value": 0.25, "folder": "checkpoints/step-1"})
    made[0].finish("finished")
    made[1].finish("failed", "loss is nan\nat step 2")
    return tmp_path / "runs", *made


def test_listing_shows_one_line_a_run_with_its_end(history, capsys):
    root, alpha, beta = history
    for words in (["list", "--root", str(root)], ["--root", str(root)]):
        assert runs(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["RUN", "STATUS", "STEP", "LOSS", "TIME", "CAUSE"]
        assert lines[1].split() == [alpha.id, "finished", "2", "0.123457", "0:00:00"]
        assert lines[2].split() == [beta.id, "failed", "2", "nan", "0:00:00", "loss", "is", "nan", "at", "step", "2"]
        assert len(lines) == 3


def test_listing_an_empty_folder_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs([]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"


def test_json_is_valid_even_with_a_diverged_loss(history, capsys):
    root, alpha, beta = history

    def refuse(text):
        raise AssertionError(text)

    runs(["list", "--json", "--root", str(root)])
    rows = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [(row["id"], row["status"]) for row in rows] == [(alpha.id, "finished"), (beta.id, "failed")]
    assert rows[1]["metrics"] == {"step": 2, "loss": "nan"}
    runs(["show", beta.id, "--json", "--root", str(root)])
    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown["config"] == {"rank": 16, "lr": 0.1} and shown["checkpoints"] == ["step-2"]
    runs(["compare", alpha.id, beta.id, "--json", "--root", str(root)])
    compared = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert compared["config"] == {"rank": [8, 16]} and compared["metrics"]["loss"] == [0.123456789, "nan"]


def test_show_tells_how_it_ended_and_what_it_can_resume_from(history, capsys):
    root, _, beta = history
    runs(["show", beta.id, "--root", str(root)])
    out = capsys.readouterr().out
    for part in ("failed (loss is nan", "checkpoints  step-2", "rank  16", "sampler  7", "loss  nan", str(beta.path)):
        assert part in out
    assert "best" not in out
    runs(["show", made_first(root), "--root", str(root)])
    out = capsys.readouterr().out
    assert "best         eval_loss 0.25 after step 1: checkpoints/step-1" in out and "command      " in out


def made_first(root):
    return sorted(root.iterdir(), key=lambda path: "beta" in path.name)[0].name


def test_a_run_is_found_by_the_start_of_its_id_or_its_folder(history, capsys):
    root, alpha, beta = history
    for word in (beta.id, beta.id[: beta.id.index("beta") + 2], str(beta.path)):
        assert runs(["show", word, "--root", str(root)]) == 0
        assert capsys.readouterr().out.startswith(beta.id)
    with pytest.raises(UsageError, match=f"means 2 runs, {alpha.id}, {beta.id}"):
        runs(["show", beta.id[:4], "--root", str(root)])
    with pytest.raises(UsageError, match=f"did you mean the run {beta.id}"):
        runs(["show", beta.id.replace("beta", "betta"), "--root", str(root)])


def test_compare_shows_the_differences_and_both_final_metrics(history, capsys):
    root, alpha, beta = history
    runs(["compare", alpha.id, beta.id, "--root", str(root)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["CONFIG", alpha.id, beta.id] in lines and ["rank", "8", "16"] in lines
    assert ["loss", "0.123457", "nan"] in lines
    assert not any(line and line[0] == "lr" for line in lines)
    runs(["compare", alpha.id, alpha.id, "--root", str(root)])
    assert capsys.readouterr().out.startswith("config: the same\n")


def test_wrong_actions_and_flags_are_usage_errors(history, capsys):
    with pytest.raises(UsageError, match="did you mean list"):
        runs(["lsit"])
    assert runs(["show"]) == 2
    assert runs(["list", "--rot", "x"]) == 2
    assert "--root" in capsys.readouterr().err
    for words in (["--help"], ["show", "--help"]):
        assert runs(words) == 0
        assert "Usage: local-tinker runs" in capsys.readouterr().out


def test_the_command_loads_no_torch(tmp_path):
    code = (
        "import sys; from local_tinker.cli.runs import runs; runs([]); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sessions": []}, r"sessions is \[\]"),
        ({"sessions": ["x"]}, r"sessions\[0\] is 'x'"),
        ({"sessions": [{"seconds": "long"}]}, r"sessions\[0\].seconds is 'long'"),
        ({"config": [1]}, r"config is \[1\]"),
        ({"created": 3}, "created is 3"),
        ({"git": "abc"}, "git is 'abc'"),
        ({"best": {"metric": "x"}}, "best.value is missing"),
        ({"versions": 3}, "versions is 3"),
    ],
)
def test_a_record_of_the_wrong_kind_is_named_and_the_other_runs_are_listed(history, capsys, change, says):
    root, alpha, beta = history
    record = json.loads((beta.path / "run.json").read_text())
    (beta.path / "run.json").write_text(json.dumps({**record, **change}))
    assert runs(["list", "--root", str(root)]) == 0
    out, err = capsys.readouterr()
    assert alpha.id in out and beta.id not in out
    assert re.search(rf"run.json is damaged \({says}\); restore or remove the folder", err) and str(beta.path) in err
    with pytest.raises(CheckpointError, match=says):
        runs(["show", str(beta.path)])


def test_what_a_record_may_lack_is_not_missed(history, capsys):
    root, alpha, _ = history
    record = json.loads((alpha.path / "run.json").read_text())
    for name in ("cause", "git", "best", "data", "seeds", "versions"):
        del record[name]
    del record["sessions"][0]["seconds"]
    (alpha.path / "run.json").write_text(json.dumps(record))
    assert runs(["show", alpha.id, "--root", str(root)]) == 0
    assert "status       finished\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (b'{"step": 3, "loss', "metrics.jsonl ends in half a line, as a crash leaves it; that line is left out"),
        (b"not JSON\n", "metrics.jsonl, line 3: not a metrics row with a step and numbers; left out"),
        (b'{"step": 3, "loss": [1]}\n', "metrics.jsonl, line 3: not"),
        (b'{"step": 3, "loss": "high"}\n', "metrics.jsonl, line 3: not"),
        (b'{"step": true, "loss": 1}\n', "metrics.jsonl, line 3: not"),
        (b"[3]\n", "metrics.jsonl, line 3: not"),
        (b"\xff\n" * 3, "line 3: not a metrics row with a step and numbers (nor are 2 later ones); left out"),
    ],
)
def test_damaged_metrics_are_said_once_and_the_rest_is_shown(history, capsys, damage, says):
    root, alpha, beta = history
    with open(alpha.path / "metrics.jsonl", "ab") as file:
        file.write(damage)
    for words in (["list"], ["show", alpha.id], ["compare", alpha.id, beta.id], ["show", alpha.id, "--json"]):
        assert runs([*words, "--root", str(root)]) == 0
        out, err = capsys.readouterr()
        assert "0.12345" in out and err.count("\n") == 1 and says in err and str(alpha.path) in err


def test_metrics_that_cannot_be_read_are_said(history, capsys):
    root, alpha, _ = history
    (alpha.path / "metrics.jsonl").unlink()
    (alpha.path / "metrics.jsonl").mkdir()
    assert runs(["list", "--root", str(root)]) == 0
    assert "metrics.jsonl cannot be read (Is a directory); it is left out" in capsys.readouterr().err
