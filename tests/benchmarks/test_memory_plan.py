"""The memory benchmark's bookkeeping on a CPU."""

import subprocess
import sys
from pathlib import Path

from benchmarks import memory_plan
from local_tinker.engine.footprint import Choice, TrainSettings, total_bytes
from tests.engine.shapes import LLAMA_3B

ROOT = Path(__file__).parents[2]


def test_amounts_of_memory_rise_from_the_least_to_everything():
    settings = TrainSettings(started=True)
    for length in memory_plan.LENGTHS:
        found = memory_plan.limits(LLAMA_3B, settings, length)
        roomy = Choice(tokens=max(8192, length), levels=("norms",) * 28)
        assert list(found) == ["tight", "middle", "free"]
        assert found["tight"] < found["middle"] < total_bytes(LLAMA_3B, settings, roomy) < found["free"]


def test_the_tiny_form_runs_six_configurations_by_their_plans():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_plan", "--tiny"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("tiny ")]
    assert [(row[1], row[2]) for row in rows] == [(n, m) for n in ("64", "600") for m in ("tight", "middle", "free")]
    assert "STEPPED DOWN" not in done.stdout
