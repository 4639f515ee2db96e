"""`plan`: the numbers of the memory plan, as they are printed and as JSON."""

import json
import re

import pytest

from local_tinker.cli import app
from local_tinker.engine.footprint import GIB, TrainSettings
from local_tinker.engine.memory import plan_training
from local_tinker.model import catalogue


def ask(capsys, *words):
    code = app.main(["plan", *words])
    return code, *capsys.readouterr()


def test_json_is_the_plan(capsys):
    code, out, _ = ask(capsys, "llama-3.1-8b", "--vram", "24", "--rank", "8", "--seq-len", "8000", "--json")
    settings = TrainSettings(rank=8, seq_len=8000)
    plan = plan_training(catalogue.find("llama-3.1-8b").dims, settings, 24 * GIB)
    found = json.loads(out)
    assert code == 0 and found["total_bytes"] == plan.total == sum(found["parts"].values())
    assert (
        found["choice"]["tokens"] == plan.choice.tokens and found["fits"] and len(found["levers"]) == len(plan.levers)
    )
    assert tuple(found["choice"]["levels"]) == plan.choice.levels and found["host_bytes"] == plan.host_bytes


def test_the_parts_add_up_to_the_total_shown_and_levers_are_named(capsys):
    code, out, _ = ask(capsys, "qwen3-4b", "--vram", "24")
    rows = [line.rsplit(maxsplit=2) for line in out.splitlines()[1:] if line.endswith("GiB") and "saves" not in line]
    *parts, (name, total, _) = rows
    assert (
        code == 0
        and name.strip() == "total"
        and sum(float(size) for _, size, _ in parts) == pytest.approx(float(total), abs=0.06)
    )
    assert "fits; choice: micro-batches of" in out and "to need less:\n  " in out and ": saves " in out
    assert out.count(": saves ") == 3 and "% slower" in out


def test_what_waits_on_the_host_is_shown(capsys):
    out = ask(capsys, "llama-3.2-3b", "--vram", "4.5")[1]
    assert re.search(r"^and \d\.\d\d GiB of host memory$", out, re.MULTILINE) and "'offload'" in out
    assert "host memory" not in ask(capsys, "llama-3.2-3b", "--vram", "80")[1].split("to need less")[0]


def test_a_model_too_large_does_not_fit(capsys):
    assert "does not fit; choice:" in ask(capsys, "llama-3.1-8b", "--vram", "4")[1]


def test_a_longer_row_and_no_quantisation_need_more(capsys):
    def total(*more):
        return json.loads(ask(capsys, "llama-3.2-1b", "--vram", "8", "--json", *more)[1])["parts"]

    assert total("--quantize", "none")["base weights"] > 3 * total()["base weights"]
    assert sum(total("--seq-len", "16000").values()) > sum(total().values())


def test_this_machine_is_asked_without_vram(capsys, tiny_model):
    code, out, _ = ask(capsys, str(tiny_model))
    assert code == 0 and "free\n" in out.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["smolm2-135m"], 3, "did you mean smollm2-135m"),
        (["smollm2-135m", "--quantize", "3bit"], 2, "--quantize must be one of"),
        (["smollm2-135m", "--vram", "0"], 2, "--vram takes"),
        (["smollm2-135m", "--rank", "0"], 2, "--rank must be >= 1"),
        (["smollm2-135m", "--seq-len", "999999"], 2, "longer than the context"),
    ],
)
def test_impossible_questions_are_refused(capsys, words, code, says):
    found, out, err = ask(capsys, *words)
    assert found == code and out == "" and says in err
