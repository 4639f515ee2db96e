"""The gap benchmark: its statistics by hand, its tiny run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gap

ROOT = Path(__file__).parents[2]


def test_statistics_by_hand():
    found = gap.statistics([0.0, math.log(1.2), math.log(0.95), -0.2])
    values = [0.0, 0.18232, -0.05129, -0.2]
    assert found["tokens"] == 4 and found["outside"] == 0.5
    assert found["mean"] == pytest.approx(sum(values) / 4, rel=1e-2)
    assert found["mean_abs"] == pytest.approx(sum(map(abs, values)) / 4, rel=1e-2)
    assert found["max_abs"] == 0.2
    assert found["sd"] == pytest.approx(math.sqrt(sum((v + 0.01724) ** 2 for v in values) / 4), rel=1e-2)


def test_the_tiny_form_measures_both_sides_in_both_types(tiny_model):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gap", "--tiny", str(tiny_model)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert list(found) == ["float32", "bfloat16"]
    for side in ("ours", "transformers"):
        assert found["float32"][side]["tokens"] == found["bfloat16"][side]["tokens"] == 32
        assert found["float32"][side]["max_abs"] < 1e-4 and found["bfloat16"][side]["max_abs"] < 0.5
