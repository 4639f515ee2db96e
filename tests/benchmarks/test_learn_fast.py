"""The learning check: it runs both roads, and it tells curves that differ from curves that do not."""

import sys

import pytest

from benchmarks import learn_fast


def test_both_roads_run_and_agree_on_a_small_model(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["learn_fast", "--tiny", str(tiny_model)])
    with pytest.raises(SystemExit) as stopped:
        learn_fast.main()
    assert stopped.value.code == 0 and "'same': True" in capsys.readouterr().out


def test_a_drift_beyond_the_noise_is_told_apart():
    fast = [3.0, 2.0, 1.0]
    within = learn_fast.compare(fast, [3.0, 2.02, 1.01], [3.0, 2.01, 0.99], [3.0, 2.5, 1.0])
    assert within["drift"] == pytest.approx(0.01) and within["noise"] == pytest.approx(0.02 / 3) and within["same"]
    assert not learn_fast.compare(fast, [3.0, 2.2, 1.1], [3.0, 2.01, 0.99], fast)["same"]
    assert learn_fast.compare(fast, [3.0, 2.0, 1.001], fast, fast)["same"]
