"""The sampling benchmark: its limits against figures worked by hand, its tiny run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import models, sample
from benchmarks.sample import Case

ROOT = Path(__file__).parents[2]


def test_prompts_are_of_one_length_seeded_and_as_many_as_groups():
    prompts = Case("tiny", 8, 4, 20, 5).prompts()
    assert [len(prompt) for prompt in prompts] == [20, 20] and prompts[0] != prompts[1]
    assert prompts == Case("tiny", 8, 4, 20, 5).prompts()
    assert all(0 < token < 512 for prompt in prompts for token in prompt)


def test_the_roofline_by_hand():
    card = {"read": 1e9, "flops": 1e12}
    weights, kv, parameters = models.step_bytes("tiny", linear_bytes=2.0)
    # 2 layers of q, k, v, o (64 x 64, twice 64 x 32, 64 x 64), gate, up, down (64 x 128), and the head (512 x 64)
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert parameters == linear + 512 * 64 and kv == 2 * 2 * 2 * 16 * 2
    assert weights == pytest.approx(2 * parameters, rel=0.01)  # and the norms
    # 8 completions of 10 tokens in groups of 4 on prompts of 100: 2 prompts, and half the completions on average
    expected = weights / 1e9 + (2 * 100 + 8 * 5) * kv / 1e9
    assert Case("tiny", 8, 4, 100, 10).roofline(card) == pytest.approx(expected)
    slow = {"read": 1e9, "flops": 1e6}
    expected = 2 * parameters * 8 / 1e6 + (2 * 100 + 8 * 5) * kv / 1e9
    assert Case("tiny", 8, 4, 100, 10).roofline(slow) == pytest.approx(expected)


def test_the_ideal_schedule_by_hand():
    # Two rows: 3 and 1 begin; 4 joins after one step and runs two steps beside 3's rest, then two alone.
    assert sample.ideal_seconds([3, 1, 4], 2, {1: 10.0, 2: 15.0}) == pytest.approx((1 + 2) * 0.015 + 2 * 0.010)


def test_the_tiny_form_prints_a_whole_table_and_writes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sample", "--tiny", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    table = [line for line in lines if "tok_s" in line and line["mode"] != "skew"]
    cases = [(line["mode"], line["batch"], line["group"]) for line in table]
    assert cases == [(m, *c) for m in ("hf", "ours", "deterministic", "base", "nf4") for c in ((1, 1), (4, 2))]
    for line in table:
        seconds = line["batch"] * 12 / line["tok_s"]
        step = (seconds - line["prefill_s"]) / 11
        assert line["step_ms"] == pytest.approx(step * 1e3, rel=0.05, abs=0.1)
        assert line["decode_tok_s"] == pytest.approx(line["batch"] / line["step_ms"] * 1e3, rel=0.01)
    others = {line["mode"]: line for line in lines if line not in table}
    assert set(others) == {"start", "update", "skew"}
    assert 0 < others["update"]["update_ms"] < others["update"]["update_and_first_token_ms"]
    assert others["skew"]["tokens"] > 512 * 8 and not list(tmp_path.iterdir())
