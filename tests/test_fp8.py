"""compute="fp8" through the client: an approximation of the dense step, and everything else as ever."""

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch

from local_tinker.cli import app
from local_tinker.errors import UsageError
from tests.test_training import ROWS, client, gradient, inner, relative  # noqa: F401  (client is a fixture)


def step(trainer):
    trainer.forward_backward(ROWS)
    found = gradient(trainer)
    trainer.optim_step(learning_rate=1e-3)
    return found


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_gradients_are_near_those_of_the_dense_base_and_no_plan_changes_a_bit(client, quantize):  # noqa: F811
    exact = step(client(quantize=quantize))
    trainer = client(quantize=quantize, compute="fp8")
    state = inner(trainer)
    layers, found = state.model.dims.layers, {}
    for level in ("norms", "attention_mlp", "layer"):
        for resident in (0, layers):
            choice = replace(state.budget.choice, levels=(level,) * layers, resident_layers=resident)
            state.budget = replace(state.budget, choice=choice)
            trainer.forward_backward(ROWS)
            found[level, resident] = gradient(trainer)
            trainer._engine.discard_gradients(trainer._id)
            assert (state.model.held_bytes > 0) == (resident > 0)
    first = found["norms", layers]
    assert 2e-3 < relative(first, exact) < 0.15
    assert all(torch.equal(first, other) for other in found.values())


@pytest.mark.parametrize("started", [True, False])
def test_the_reference_multiplies_as_the_policy_does(client, started):  # noqa: F811
    trainer = client(compute="fp8")
    state = inner(trainer)
    with torch.no_grad():
        if started:  # from a saved adapter, which is then the reference
            state.reference = state.adapter.compute.clone()
        else:  # the base is, and the policy adds nothing to it yet
            state.adapter.master.zero_()
            state.adapter.refresh()
    pair = {"prompt": "What is one plus two?", "chosen": "Three.", "rejected": "Four."}
    assert float(trainer.forward_backward([pair], loss_fn="dpo")) == pytest.approx(math.log(2), abs=1e-6)


def test_sampling_runs_in_the_compute_type_and_gives_the_room_back(client):  # noqa: F811
    trainer, dense = client(quantize="4bit", compute="fp8"), client(quantize="4bit")
    step(trainer)
    model = inner(trainer).model
    assert model.held_bytes == sum(2 * li.in_features * li.out_features for li in model.projections.values())
    sampled = trainer.save_weights_and_get_sampling_client().sample("one", max_tokens=5, temperature=0)
    assert not any(group.held for group in model._groups_in_fp8)
    step(dense)
    again = dense.save_weights_and_get_sampling_client().sample("one", max_tokens=5, temperature=0)
    assert len(sampled.tokens) == len(again.tokens) == 5
    before = step(trainer)
    other = client(quantize="4bit", compute="fp8")
    step(other)
    assert torch.equal(before, step(other))  # sampling in between changed nothing


def test_a_state_says_how_it_was_computed(client, service, tmp_path):  # noqa: F811
    trainer = client(compute="fp8")
    step(trainer)
    trainer.save_state(tmp_path / "state")
    resumed = service.create_training_client_from_state(tmp_path / "state")
    assert inner(resumed).budget.settings.fp8
    dense = service.create_training_client_from_state(tmp_path / "state", compute=None)
    assert not inner(dense).budget.settings.fp8
    found, expected = step(resumed), step(trainer)
    assert torch.equal(found, expected) and not torch.equal(step(dense), expected)


def test_what_cannot_multiply_8_bit_floats_is_refused_with_the_reason(client, monkeypatch):  # noqa: F811
    with pytest.raises(UsageError, match="None or \"fp8\", got 'fp16'"):
        client(compute="fp16")
    monkeypatch.setattr("local_tinker.model.loaded.fp8_fault", lambda capability: "the card is older")
    with pytest.raises(UsageError, match="does not run here: the card is older; use compute=None"):
        client(compute="fp8")
    monkeypatch.undo()
    model = inner(client()).model
    monkeypatch.setattr(model, "fast", None)
    assert "plain road" in model.fp8_fault()


def test_training_and_sampling_in_turns_hold_one_form_of_the_weights(client):  # noqa: F811
    trainer = client(quantize="4bit", compute="fp8")
    model = inner(trainer).model
    sampled = trainer.save_weights_and_get_sampling_client()
    sampled.sample("one", max_tokens=2)
    dense = [
        weakref.ref(group._resident.untyped_storage()) for layer in model.fast.weights.layers for group in layer.groups
    ]
    assert all(storage() is not None for storage in dense)
    step(trainer)
    assert not any(storage() is not None for storage in dense) and model.held_bytes > 0
    sampled.sample("one", max_tokens=2)


def test_a_dense_base_stays_where_it_is_whoever_trains(client):  # noqa: F811
    eight, dense = client(quantize=None, compute="fp8"), client(quantize=None)
    model = inner(dense).model
    places = set()
    for _ in range(3):
        step(dense)
        places.add(tuple(group._resident.data_ptr() for layer in model.fast.weights.layers for group in layer.groups))
        state = inner(eight)
        state.budget = replace(state.budget, choice=replace(state.budget.choice, resident_layers=0))
        step(eight)
    assert len(places) == 1


def test_rollouts_of_the_exact_base_are_pointed_out(client):  # noqa: F811
    trainer = client(compute="fp8")
    said = []
    trainer._say = said.append
    groups = trainer.save_weights_and_get_sampling_client().sample_batch(["one", "4"], n=2, max_tokens=3)
    trainer.forward_backward(groups, [[0.0, 1.0], [1.0, 0.0]], loss_fn="grpo", old_logprobs="trainer")
    assert not any("fp8" in line for line in said)
    trainer.forward_backward(groups, [[0.0, 1.0], [1.0, 0.0]], loss_fn="grpo")
    assert sum("not 1 at the start" in line for line in said) == 1


@pytest.mark.parametrize(("loss", "said"), [("importance_sampling", True), ("sft", False)])
def test_only_losses_that_read_a_samplers_log_probs_point_that_out(client, loss, said):  # noqa: F811
    trainer, lines = client(compute="fp8"), []
    trainer._say = lines.append
    (completion,) = trainer.save_weights_and_get_sampling_client().sample_batch(["one"], max_tokens=3)
    trainer.forward_backward([completion], *([[1.0]] if loss != "sft" else []), loss_fn=loss)
    assert any("not 1 at the start" in line for line in lines) == said


def test_a_run_on_an_older_card_says_so_before_it_loads_anything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("local_tinker.recipes.early.fp8_fault", lambda capability: "the card is older")
    words = ["run", "--model", "smollm2-135m", "--dataset", str(tmp_path / "none.jsonl"), "--compute", "fp8"]
    assert app.main(words) == 2
    assert "compute=fp8 does not run here: the card is older" in capsys.readouterr().err


def test_the_plan_counts_8_bit_floats(capsys):
    def planned(*words):
        assert app.main(["plan", "llama-3.2-3b", "--vram", "6", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    dense, eight = planned(), planned("--compute", "fp8")
    assert eight["parts"]["dequantisation"] == dense["parts"]["dequantisation"] * 5 // 2
    assert app.main(["plan", "llama-3.2-3b", "--compute", "fp4"]) == 2
    assert "got 'fp4'" in capsys.readouterr().err
