"""The `run` command as a user types it; the loop itself is tested in tests/recipes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from local_tinker.cli import app
from local_tinker.runs import list_runs

ROWS = [
    {"prompt": question, "completion": answer}
    for question, answer in [("one", " two"), ("the", " fox"), ("dog", " lazy")]
]


@pytest.fixture
def words(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = [
        "--model",
        tiny_model,
        "--dataset",
        rows,
        "--output-dir",
        tmp_path / "runs",
        "--rank",
        "2",
        "--batch-size",
        "3",
    ]
    return [str(word) for word in flags]


def test_help_lists_flags_of_the_recipe_asked_for_and_loads_no_torch(capsys):
    assert app.main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--learning-rate FLOAT" in text and "--group-size" not in text
    assert app.main(["run", "--loss", "grpo", "--help"]) == 0
    assert "--group-size INT            Answers a prompt. [8]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["run", "--help"], ["run", "--loss", "ppo", "--help"], ["quickstart", "--help"], ["chat", "--help"]]
)
def test_help_is_quick_and_loads_no_heavy_library(argv):
    script = (
        f"import sys; from local_tinker.cli.app import main; code = main({argv!r});"
        "bad = [m for m in ('torch', 'transformers', 'yaml', 'numpy') if m in sys.modules];"
        "sys.exit(code or (str(bad) if bad else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_4_bit_base_from_a_config_file_trains_and_its_run_can_be_sampled(words, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        f"model: {words[1]}\ndataset: rows.jsonl\nlearning_rate: 1e-2\nepochs: 2\nrank: 2\n"
    )
    assert app.main(["run", "-c", str(tmp_path / "c.yaml"), "--output-dir", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert (
        "  quantize            4bit" in out and f"  dataset             {tmp_path}/rows.jsonl" in out and "> one" in out
    )
    (run,) = list_runs(tmp_path / "runs")
    assert app.main(["run", "-c", str(run.path / "config.yaml"), "--dry-run"]) == 0
    capsys.readouterr()
    argv = [
        "sample",
        run.id[:18],
        "one",
        "--raw",
        "--root",
        str(tmp_path / "runs"),
        "--max-tokens",
        "3",
        "--temperature",
        "0",
        "--json",
    ]
    assert app.main(argv) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["tokens"]) <= 3


@pytest.mark.parametrize(
    "argv, says",
    [(["--rnk", "2"], "--rnk: unknown option, did you mean --rank?"), (["--config", "nope"], "no config file 'nope'")],
)
def test_a_typo_ends_with_code_2_and_one_line(words, capsys, argv, says):
    assert app.main(["run", *words, *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_progress_goes_to_stderr_and_results_to_stdout(words, capsys):
    assert app.main(["run", *words]) == 0
    out, err = capsys.readouterr()
    assert "step 1/1  loss" in err and "tok/s" in err and "step 1/1" not in out
    assert "config\n" in out and "finished after 1 step:" in out and "config\n" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_on_the_program_saves_and_exits_with_130(words, tmp_path, service):
    argv = [sys.executable, "-m", "local_tinker", "run", *words, "--epochs", "20000"]
    done = subprocess.Popen(
        argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "COLUMNS": "60"}
    )
    for line in done.stderr:
        if "step" in line and "tok/s" in line:
            break
    time.sleep(0.2)
    done.send_signal(signal.SIGINT)
    rest = done.stderr.read()
    assert done.wait(60) == 130 and "Traceback" not in rest, rest
    assert "to go on: local-tinker run --resume" in rest
    (run,) = list_runs(tmp_path / "runs")
    state = run.latest_checkpoint()
    assert run.status == "interrupted" and state.meta["step"] >= 1
    assert service.create_training_client_from_state(state.path).step == state.meta["step"]


def test_a_recipe_is_a_program_of_its_own(words, tmp_path):
    argv = [sys.executable, "-m", "local_tinker.recipes.sft", *words, "--dry-run"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and "rows: 3 kept" in done.stdout
    wrong = subprocess.run([*argv, "--loss", "dpo"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "this is the recipe 'sft'" in wrong.stderr
