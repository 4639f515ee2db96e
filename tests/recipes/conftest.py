"""Small runs: a tiny model, a few rows, and what they print."""

import json

import pytest

QUESTIONS = [
    "one",
    "the fox",
    "dog?",
    "What is one plus two?",
    "4",
    "lazy dog",
    "quick brown",
    "0123",
    "over the",
    "system",
]
ANSWERS = [
    "two three",
    "jumps over",
    "The quick brown fox.",
    "Three.",
    "5",
    "brown",
    "fox jumps",
    "456789",
    "lazy dog",
    "user",
]


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(chat(q, a)) + "\n" for q, a in zip(QUESTIONS, ANSWERS, strict=True)))
    return path


@pytest.fixture
def pairs_file(tmp_path):
    rows = [{"prompt": q, "chosen": a, "rejected": a + " 0123456789"} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def words(tiny_model, rows_file, tmp_path):
    """Flags of a quick exact run on the tiny model."""
    given = {
        "model": tiny_model, "dataset": rows_file, "rank": 4, "quantize": "none", "dtype": "float32",
        "learning-rate": "1e-2", "batch-size": 4, "output-dir": tmp_path / "runs", "samples": 1,
    }  # fmt: skip

    def flags(**changes):
        merged = {**given, **{key.replace("_", "-"): value for key, value in changes.items()}}
        return [str(word) for key, value in merged.items() if value is not None for word in (f"--{key}", value)]

    return flags


@pytest.fixture
def the_run(tmp_path):
    """The only run of the folder."""
    from local_tinker.runs import list_runs

    def only():
        (run,) = list_runs(tmp_path / "runs")
        return run

    return only
