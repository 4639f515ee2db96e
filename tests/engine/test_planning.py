import pytest
import torch

from local_tinker.engine import planning
from local_tinker.engine.planning import plan_budget
from local_tinker.model.adapter import AdapterSpec
from local_tinker.model.load import load_model


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, quantize="4bit", dtype="bfloat16", device="cpu")


def spec(model):
    shapes = tuple((path, (linear.out_features, linear.in_features)) for path, linear in model.projections.items())
    return AdapterSpec(rank=4, alpha=8, shapes=shapes)


def test_with_memory_to_spare_weights_stay_dense_and_nothing_is_recomputed(model):
    budget = plan_budget(model, spec(model), micro_batch_tokens=None)
    assert budget.hold_weights and set(budget.levels) == {"norms"} and budget.micro_batch_tokens == 4096


def test_with_little_memory_layers_are_recomputed_and_weights_dequantised_again(model, monkeypatch):
    plenty = plan_budget(model, spec(model), micro_batch_tokens=None).plan.total
    monkeypatch.setattr(planning, "_free_bytes", lambda device: plenty // 3)
    tight = plan_budget(model, spec(model), micro_batch_tokens=None)
    assert set(tight.levels) == {"layer"} and tight.micro_batch_tokens < 4096
    monkeypatch.setattr(planning, "_free_bytes", lambda device: plenty // 20)
    assert not plan_budget(model, spec(model), micro_batch_tokens=None).hold_weights


def test_the_users_micro_batch_is_taken_as_given(model):
    assert plan_budget(model, spec(model), micro_batch_tokens=77).micro_batch_tokens == 77


def test_dimensions_of_a_loaded_model_are_those_of_its_tensors(model):
    dims = model.dims
    assert dims.linear_params == sum(p.in_features * p.out_features for p in model.projections.values())
    assert dims.vocab == model.head.weight.shape[0] and model.dtype == torch.bfloat16


def test_free_memory_is_what_the_card_has_within_the_share_the_allocator_is_held_to(monkeypatch):
    card = {"mem_get_info": (70, 100), "memory_reserved": 8, "memory_allocated": 5}
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for share, free in ((1.0, 70 + 3), (0.5, 42 + 3), (0.05, 3)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
        assert planning._free_bytes(torch.device("cuda")) == free
