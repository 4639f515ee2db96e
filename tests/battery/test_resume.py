"""Runs that are really killed, and what their continuation comes to: every bit of a run that was never interrupted."""

from __future__ import annotations

import random
import time

import pytest

from .forks import KILLED
from .runs import BASES, LOSSES, Subject, assert_same

pytestmark = pytest.mark.battery


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_killed_in_an_epoch_and_again_at_its_edge_equals_one_never_interrupted(
    forks, tmp_path, tiny_model, loss, base, full, figures
):
    whole = Subject(forks, tmp_path / "whole", tiny_model, loss, base)
    whole.start()
    wanted = whole.result()
    assert len(wanted["steps"]) == 6
    places = ["forward_backward", "optim_step", "log", *(["sample_batch"] if loss in ("grpo", "ppo") else [])]
    for number in range(len(places) if full else 1):
        place = places[(number + list(BASES).index(base)) % len(places)]
        cut = Subject(forks, tmp_path / f"cut-{number}", tiny_model, loss, base)
        each = 4 if loss == "ppo" and place in ("forward_backward", "optim_step") else 1
        cut.start(kill=[place, 2 * each + 1])  # in step 3, with the checkpoint after step 2: in the middle of an epoch
        assert cut.saved_step() == 2
        cut.start(kill=[place, 1 * each + 1])  # resumed, and killed in step 4: the checkpoint is at the edge
        assert cut.saved_step() == 3
        cut.start(kill=[place, 1])  # a resume of a resume, killed before it saves anything of its own
        assert cut.saved_step() == 3
        cut.start()
        assert_same(cut.result(), wanted)
        cut.check_checkpoints()
    figures(kills=3 * (number + 1))


def test_a_run_killed_at_random_moments_until_it_is_done_equals_one_never_interrupted(
    forks, tmp_path, tiny_model, full, figures
):
    chance, kills, most = random.Random(7), 0, 40 if full else 8
    for loss in LOSSES if full else ["sft", "ppo"]:
        whole = Subject(forks, tmp_path / f"whole-{loss}", tiny_model, loss, "fp32", epochs=6)
        began = time.monotonic()
        whole.start()
        seconds = time.monotonic() - began
        cut = Subject(forks, tmp_path / f"cut-{loss}", tiny_model, loss, "fp32", epochs=6)
        for _ in range(most):
            code = cut.start(check=False, kill=[chance.uniform(0.1, 0.9) * seconds])
            assert code in (KILLED, 0), cut.log()
            kills += code == KILLED
            if code == 0:
                break
        else:
            cut.start()
        assert_same(cut.result(), whole.result())
    assert kills > 1
    figures(kills=kills)


def test_a_run_killed_after_any_change_of_the_disk_equals_one_never_interrupted(
    forks, tmp_path, tiny_model, full, figures
):
    short = {"epochs": 1, "keep-last": 1, "eval-every": 1}
    whole = Subject(forks, tmp_path / "whole", tiny_model, "sft", "fp32", **short)
    whole.start(count=str(tmp_path / "count"))
    calls, wanted = int((tmp_path / "count").read_text()), whole.result()
    assert calls > 100
    points = range(1, calls + 1) if full else range(3, calls + 1, 11)
    for at in points:
        cut = Subject(forks, tmp_path / str(at), tiny_model, "sft", "fp32", **short)
        cut.start(kill=["disk", at], check=False)
        before = cut.saved_step()
        if not (before and cut.run.status == "finished"):
            cut.start()
            # without a checkpoint it is begun anew
            assert not before or f"after step {before}" in cut.log()
        assert_same(cut.result(), wanted)
        assert not [path for path in cut.run.checkpoints.iterdir() if path.name.startswith(".")]
    figures(disk_calls=calls, kills=len(points))


def test_a_kill_while_a_checkpoint_is_loaded_costs_nothing(forks, tmp_path, tiny_model):
    whole = Subject(forks, tmp_path / "whole", tiny_model, "ppo", "fp32", epochs=1)
    whole.start()
    cut = Subject(forks, tmp_path / "cut", tiny_model, "ppo", "fp32", epochs=1)
    cut.start(kill=["log", 2])
    for at in (1, 2, 3):  # adapter, optimiser, value head
        cut.start(kill=["load", at])
        assert cut.saved_step() == 1
    cut.start()
    assert_same(cut.result(), whole.result())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_at_any_call_saves_or_abandons_cleanly_and_the_rest_is_the_same(
    forks, tmp_path, tiny_model, name, full
):
    whole = Subject(forks, tmp_path / "whole", tiny_model, "sft", "fp32", epochs=1)
    whole.start()
    wanted = whole.result()
    for place, at in [("forward_backward", 1), ("optim_step", 2), ("log", 1), ("disk", 30), ("evaluation", 1)]:
        cut = Subject(forks, tmp_path / f"{place}-{at}", tiny_model, "sft", "fp32", epochs=1)
        assert cut.start(check=False, stop=[name, place, at]) == 130, cut.log()
        assert cut.run.status == "interrupted" and cut.run.cause in (name, "Ctrl-C")
        assert "Traceback" not in cut.log()
        cut.start()
        assert_same(cut.result(), wanted)
