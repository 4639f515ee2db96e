"""The CPU benchmark's comparison with transformers, on a tiny model."""

import pytest
import torch

from benchmarks import cpu


def test_both_sides_give_the_same_tokens_and_rates_come_from_medians(tiny_model, monkeypatch):
    threads = torch.get_num_threads()
    found = cpu.sampling(str(tiny_model), batches=(1, 5), prompt=9, new=6, rounds=2, threads=1)
    assert torch.get_num_threads() == threads
    for batch in (1, 5):
        line = found[f"batch {batch}"]
        assert line["same_tokens"] and all(line[side]["tok_s"] > 0 for side in ("ours", "transformers"))
    clock = iter([0.0, 1.0, 1.0, 5.0, 5.0, 6.0, 6.0, 8.0, 8.0, 11.0, 11.0, 13.0])  # first and whole: 1, 4; 1, 2; 3, 2
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: next(clock))
    timed = cpu._alternately({"ours": lambda new: [[0] * new] * 3}, 8, 3)
    assert timed == {"ours": {"tok_s": pytest.approx(3 * 8 / 2), "first_s": 1.0}}


def test_the_update_of_a_group_is_timed_with_its_prompt_once_and_repeated(tiny_model):
    from local_tinker.engine import micro_batch

    least = micro_batch.LEAST_HEAD
    found = cpu.group_update(str(tiny_model), prompt=60, new=3, rounds=1)
    assert micro_batch.LEAST_HEAD == least and found["samples"] == 8
    assert 0 < found["prompt_once"] and 0 < found["prompt_repeated"]
