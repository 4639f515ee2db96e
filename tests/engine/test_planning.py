from dataclasses import replace

import pytest
import torch

from local_tinker.engine import planning
from local_tinker.engine.footprint import Choice, standing_parts, total_bytes
from local_tinker.engine.planning import plan_budget
from local_tinker.model.adapter import AdapterSpec
from local_tinker.model.load import load_model
from tests import tiny


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, quantize="4bit", dtype="bfloat16", device="cpu")


def spec(model):
    shapes = tuple((path, (linear.out_features, linear.in_features)) for path, linear in model.projections.items())
    return AdapterSpec(rank=4, alpha=8, shapes=shapes)


def budget_of(model, free_bytes, **more):
    return plan_budget(model, spec(model), micro_batch_tokens=more.get("tokens"), free_bytes=free_bytes)


def needed(budget, choice=None):
    return total_bytes(budget.dims, budget.settings, choice or budget.choice)


def test_with_memory_to_spare_weights_stay_dense_and_nothing_is_recomputed(model):
    budget = plan_budget(model, spec(model), micro_batch_tokens=None)
    assert budget.hold_weights and set(budget.choice.levels) == {"norms"} and budget.micro_batch_tokens == 4096


def test_with_little_memory_the_choice_gets_smaller_and_stays_within_it(model):
    plenty = needed(budget_of(model, 2**40))
    tight = budget_of(model, plenty // 2)
    assert needed(tight) <= tight.limit < plenty
    assert set(tight.choice.levels) != {"norms"} or tight.micro_batch_tokens < 4096


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_found_is_on_top_of_all_that_is_loaded(tmp_path, monkeypatch, tied, dtype):
    folder = tiny.save(tmp_path / "model", tie_word_embeddings=tied, vocab_size=4000)
    model = load_model(folder, quantize="4bit", dtype=dtype, device="cpu")
    monkeypatch.setattr(planning, "_free_bytes", lambda device: 10**8)
    tables = {t.data_ptr(): t.nbytes for t in (model.plain.model.get_input_embeddings().weight, model.head.weight)}
    assert len(tables) == 2 - tied
    wide = 0 if model.head.wide is None else model.head.wide.nbytes
    loaded = sum(p.nbytes() for p in model.projections.values()) + sum(tables.values()) + wide
    assert plan_budget(model, spec(model), micro_batch_tokens=None).limit == loaded + 8 * 10**7


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_that_runs_one_document_a_row_is_planned_with_its_scores(model, monkeypatch, packed):
    monkeypatch.setattr(model, "fast", None)
    monkeypatch.setattr(model.plain, "packed", packed)
    budget = budget_of(model, 2**33, tokens=4096)
    assert budget.settings.plain and budget.settings.alone == (not packed)
    without = replace(budget.settings, alone=False)
    scores = needed(budget) - total_bytes(budget.dims, without, budget.choice)
    assert (scores >= budget.dims.heads * 4096**2 * 12) == (not packed)


def test_the_users_micro_batch_is_taken_as_given(model):
    assert plan_budget(model, spec(model), micro_batch_tokens=77).micro_batch_tokens == 77


def test_a_document_over_the_budget_gets_a_choice_of_its_own_in_the_same_memory(model):
    budget = budget_of(model, int(1.5 * needed(budget_of(model, 2**40))))
    assert budget.choice_for(100) is budget.choice_for(budget.micro_batch_tokens) is budget.choice
    longer = budget.choice_for(3 * budget.micro_batch_tokens)
    assert longer.tokens == 3 * budget.micro_batch_tokens and set(longer.levels) != {"norms"}
    assert needed(budget, longer) <= budget.limit


def test_running_out_makes_the_longest_documents_choice_smaller_until_nothing_is_left(model):
    budget = budget_of(model, 2**40)
    longest, last, steps = 20_000, float("inf"), 0
    while budget is not None:
        choice = budget.choice_for(longest)
        assert needed(budget, choice) < last or needed(budget) < last
        assert budget.choice.resident_layers <= 2 and choice.tokens == longest
        last, budget, steps = max(needed(budget, choice), needed(budget)), budget.smaller(longest), steps + 1
    assert 4 < steps < 40 and set(choice.levels) == {"layer"}


def test_a_document_that_is_too_long_in_any_way_leaves_the_plan_of_others_alone(model):
    budget, longest = budget_of(model, int(1.2 * needed(budget_of(model, 2**40)))), 200_000
    assert needed(budget, budget.choice_for(longest)) > budget.limit
    assert budget.smaller(longest) is None and budget.smaller(10) is not None


def test_another_runs_cut_is_taken_over_and_the_levels_planned_anew(model):
    budget = budget_of(model, int(1.5 * needed(budget_of(model, 2**40))))
    saved = Choice(tokens=9000, levels=("layer",) * 2, head_rows=512, tile=9000)
    other = budget.as_before(saved)
    assert (other.micro_batch_tokens, other.head_rows, other.choice.tile) == (9000, 512, 9000)
    assert other.limit == budget.limit and other.choice.levels == ("norms",) * 2
    assert other.smaller(0) is not None


def test_levels_that_decide_the_rounding_are_taken_over_where_they_fit(model):
    roomy = budget_of(model, 2**40)
    saved = Choice(tokens=9000, levels=("layer", "mlp"), head_rows=512, tile=2000)
    assert roomy.as_before(saved).choice.levels == saved.levels
    assert roomy.as_before(saved).choice.resident_layers == roomy.choice.resident_layers
    small = budget_of(model, needed(budget_of(model, 0)))
    assert small.as_before(saved).choice.levels == ("layer", "layer")


def test_what_no_training_wants_is_spare(model):
    sampling = plan_budget(model, None, micro_batch_tokens=None, free_bytes=10**9)
    small, large = budget_of(model, 10**7), budget_of(model, 10**9)
    assert sampling.spare_bytes(small, large) == sampling.limit - large.total
    parts = standing_parts(sampling.dims, sampling.settings, sampling.choice)
    weights = parts["base weights"] + parts["embeddings and head"] + parts["resident weights"]
    assert sampling.spare_bytes() == sampling.limit - weights
    kept = plan_budget(model, None, micro_batch_tokens=None, kept_bytes=10**9)
    assert abs(kept.limit - plan_budget(model, None, micro_batch_tokens=None).limit - 8 * 10**8) < 2 * 10**8


def test_a_smaller_plan_allocates_nothing_first(model):
    budget = budget_of(model, 2**40)
    parked = replace(budget, choice=replace(budget.choice, parked_moments=True, resident_layers=1))
    smaller = parked.smaller(100)
    assert smaller.choice.parked_moments and smaller.choice.resident_layers <= 1


def test_dimensions_of_a_loaded_model_are_those_of_its_tensors(model):
    dims = model.dims
    assert dims.linear_params == sum(p.in_features * p.out_features for p in model.projections.values())
    assert dims.vocab == model.head.weight.shape[0] and model.dtype == torch.bfloat16


def test_free_memory_is_what_the_card_has_within_the_share_the_allocator_is_held_to(monkeypatch):
    card = {"mem_get_info": (70, 100), "memory_reserved": 8, "memory_allocated": 5}
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for share, free in ((1.0, 70 + 3), (0.5, 42 + 3), (0.05, 3)):
        # torch refuses a device without an index here
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", {0: share, 1: 0.01}.__getitem__)
        assert planning._free_bytes(torch.device("cuda")) == planning._free_bytes(torch.device("cuda:0")) == free


def test_nearly_the_same_memory_is_not_planned_for_again(model, monkeypatch):
    monkeypatch.setitem(planning.GRAIN, "cpu", planning.GRAIN["cuda"])
    made, choose = [], planning.choose
    monkeypatch.setattr(planning, "choose", lambda *args: made.append(args) or choose(*args))
    planning._choose.cache_clear()
    for free in (10**9, 10**9 + 10**5, 10**9 - 10**5, 2 * 10**9):
        monkeypatch.setattr(planning, "_free_bytes", lambda device, free=free: free)
        assert plan_budget(model, None, micro_batch_tokens=None).limit <= free + 10**8
    assert len(made) == 2


def test_on_a_card_the_same_plan_is_found_while_other_programs_take_some_host_memory(model, monkeypatch):
    made, choose = [], planning.choose
    monkeypatch.setattr(planning, "choose", lambda *args: made.append(args) or choose(*args))
    monkeypatch.setattr(planning, "_free_bytes", lambda device: 10**9)
    monkeypatch.setattr(model, "device", torch.device("cuda"))
    planning._choose.cache_clear()
    for available in (64 * 2**30, 64 * 2**30 + 10**8, 65 * 2**30 - 10**6, 200 * 2**30):
        monkeypatch.setattr(planning, "memory", lambda available=available: (2**40, available))
        settings = plan_budget(model, None, micro_batch_tokens=None).settings
        assert 0 <= available * planning.PINNED_SHARE - settings.host_bytes < planning.HOST_GRAIN
    assert len(made) == 2
