import json

import pytest

from local_tinker.cli import app, models
from local_tinker.engine.footprint import GIB, TrainSettings
from local_tinker.engine.memory import least_bytes
from local_tinker.hardware import Hardware
from local_tinker.model import catalogue

CARD = Hardware(
    kind="cuda",
    name="NVIDIA RTX 4090",
    total_bytes=24 * GIB,
    free_bytes=23 * GIB,
    capability=(8, 9),
    bf16=True,
    count=2,
)
CPU = Hardware(
    kind="cpu", name="EPYC", total_bytes=16 * GIB, free_bytes=12 * GIB, note="no NVIDIA driver answers (why)"
)


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """Runs `models` on a pretended machine with empty caches; (exit code, stdout)."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LOCAL_TINKER_CACHE", str(tmp_path / "own"))

    def run(*words, hardware=CARD):
        monkeypatch.setattr(models, "detect", lambda: hardware)
        code = app.main(["models", *words])
        return code, capsys.readouterr().out

    return run


def row(text, name):
    return next(line.split() for line in text.splitlines() if line.startswith(name + " "))


def test_the_table_answers_for_the_card_found(ask):
    code, text = ask()
    assert code == 0 and text.startswith("NVIDIA RTX 4090 (first of 2 cards): 23.0 GiB of 24.0 GiB free\n")
    assert "MODEL                  PARAMS  QUANT      VRAM  STATUS  DISK" in text
    needs = least_bytes(catalogue.find("llama-3.1-8b").dims, TrainSettings(), 4096) / GIB
    assert row(text, "llama-3.1-8b") == ["llama-3.1-8b", "8.0B", "4bit", f"{needs:.1f}", "GiB", "ready"]
    assert row(text, "smollm2-135m")[1] == "135M"


def test_vram_answers_for_another_card(ask):
    _, small = ask("--vram", "6")
    _, large = ask("--vram", "80")
    assert small.startswith("For a card with 6.0 GiB free:")
    assert (row(small, "llama-3.1-8b")[-1], row(large, "llama-3.1-8b")[-1]) == ("OOM", "ready")
    assert all(line.split()[5] == "ready" for line in large.splitlines() if " GiB " in line and "B  4bit" in line)


def test_without_quantising_more_memory_is_needed_and_the_column_says_so(ask):
    _, text = ask("--quantize", "none")
    assert row(text, "llama-3.1-8b")[2] == "none" and row(text, "phi-4")[-1] == "OOM"


def test_without_a_card_the_answer_is_against_ram_and_says_so(ask):
    _, text = ask(hardware=CPU)
    assert text.startswith("No GPU: no NVIDIA driver answers (why).\nMeasured against RAM (12.0 GiB of 16.0 GiB free)")


def test_models_on_disk_are_marked(ask, tmp_path):
    folder = tmp_path / "hub" / "models--Qwen--Qwen3-4B" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    _, text = ask()
    assert row(text, "qwen3-4b")[-1] == "*" and row(text, "qwen3-8b")[-1] != "*"


def test_no_line_is_wider_than_sixty_columns(ask):
    for words in (["--vram", "24", "--quantize", "none"], ["--vram", "8"]):
        assert max(map(len, ask(*words)[1].splitlines())) <= 60


def test_json_holds_the_same_answer(ask):
    code, text = ask("--json")
    answer = json.loads(text)
    assert code == 0 and answer["hardware"]["name"] == "NVIDIA RTX 4090" and answer["free_bytes"] == 23 * GIB
    assert len(answer["models"]) == len(catalogue.entries())
    entry = next(m for m in answer["models"] if m["name"] == "llama-3.2-3b")
    assert entry["hub_id"] == "meta-llama/Llama-3.2-3B" and entry["gated"] and entry["license"] == "llama3.2"
    assert (entry["params"], entry["quantize"], entry["status"], entry["on_disk"]) == (
        3_212_749_824,
        "4bit",
        "ready",
        False,
    )


@pytest.mark.parametrize("words", [["--quantize", "3bit"], ["--vram", "0"], ["--vram", "-4"], ["--vram", "nan"]])
def test_impossible_questions_are_refused(ask, words):
    assert ask(*words) == (2, "")
