"""Heads that documents share: where everything stands, what a micro-batch holds, and that nothing changes but the work."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from local_tinker import Datum, ModelInput
from local_tinker.engine import micro_batch as rooms
from local_tinker.engine.micro_batch import cut, micro_batch, shared_heads
from local_tinker.losses import LOSSES
from local_tinker.model.levels import LEVELS
from tests.test_training import gradient, inner, relative, warm

CPU = torch.device("cpu")
SFT = LOSSES["sft"]
PROMPTS = ["the quick brown fox jumps over", "What is one plus two, and three?"]


def datum(tokens, first):
    """Trained from position `first` on."""
    weights = np.zeros(len(tokens), np.float32)
    weights[first:] = 1.0
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": np.array(tokens) + 100, "weights": weights})


@pytest.fixture
def short_heads(monkeypatch):
    monkeypatch.setattr(rooms, "LEAST_HEAD", 2)


@pytest.fixture
def client(service, tiny_model):
    def make(**options):
        defaults = dict(rank=4, alpha=8, quantize=None, dtype="float64", seed=1)
        trainer = service.create_lora_training_client(str(tiny_model), **{**defaults, **options})
        warm(trainer)
        return trainer

    return make


@pytest.mark.usefixtures("short_heads")
def test_datums_with_the_same_head_stand_behind_it():
    units = [(datum([1, 2, 3, 4], 2),), (datum([7, 8], 1),), (datum([1, 2, 5], 2),), (datum([1, 2, 9, 9], 3),)]
    micro = micro_batch(units, [0, 1, 2, 3], SFT, device=CPU, heads=shared_heads(units, SFT))
    assert micro.tokens.tolist() == [1, 2, 3, 4, 5, 7, 8, 1, 2, 9, 9]  # the last has another head, of three
    assert micro.positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 0, 1, 2, 3]
    assert [(d.query, d.length, d.prefix, d.before, d.behind) for d in micro.attend.documents] == [
        (0, 2, 0, 0, 3), (2, 2, 0, 2, 0), (4, 1, 0, 2, 0), (5, 2, 0, 0, 0), (7, 4, 0, 0, 0),
    ]  # fmt: skip
    assert micro.rows.tolist() == [2, 3, 4, 6, 10]
    assert micro.targets.tolist() == [103, 104, 105, 108, 109]
    assert micro.segments.tolist() == [0, 0, 1, 2, 3]
    assert micro.datums == (0, 2, 1, 3) and micro.lengths == (4, 3, 2, 4)
    assert [span.tolist() for span in micro.layout.spans] == [[2, 3], [2], [1], [3]]
    whole = micro_batch(units, [0, 1, 2, 3], SFT, device=CPU)
    assert whole.tokens.shape[0] == 13 and whole.datums == (0, 1, 2, 3)


def test_a_head_is_shared_whole_with_its_like_and_else_as_far_as_others_begin_alike():
    system, other = list(range(40)), list(range(100, 140))
    prompts = [system + [50, 51], system + [50, 52], system + [60], system + [60], other, system[:20] + [70] * 20]
    units = [(datum([*prompt, 9, 9], len(prompt)),) for prompt in prompts]
    assert shared_heads(units, SFT) == [
        [(*system, 50)], [(*system, 50)], [(*system, 60)], [(*system, 60)], [None], [None],
    ]  # fmt: skip
    micro = micro_batch(units, range(6), SFT, device=CPU, heads=shared_heads(units, SFT))
    assert [d.before for d in micro.attend.documents] == [0, 41, 41, 0, 41, 41, 0, 0]
    assert micro.positions[41:44].tolist() == [41, 42, 43] and micro.rows[:2].tolist() == [42, 43]


@pytest.mark.usefixtures("short_heads")
def test_pairs_are_named_by_where_their_datums_went():
    units = [tuple(datum([1, 2, last], 2) for last in (3, 4)), (datum([5, 6, 7], 1), datum([1, 2, 8], 2))]
    micro = micro_batch(units, [0, 1], SFT, device=CPU, heads=shared_heads(units, SFT))
    assert micro.datums == (0, 1, 3, 2) and micro.pairs.tolist() == [[0, 1], [3, 2]]


heads = st.integers(0, 3).map(lambda kind: [kind] * (20 + 7 * kind))
units_of = st.integers(1, 2).flatmap(
    lambda each: st.lists(
        st.lists(st.tuples(heads, st.integers(1, 60)), min_size=each, max_size=each), min_size=1, max_size=20
    )
)


@settings(max_examples=100, deadline=None)
@given(units_of, st.integers(1, 200))
def test_every_unit_is_in_one_micro_batch_and_each_keeps_to_the_budget(drawn, budget):
    units = [tuple(datum(head + list(range(50, 50 + rest)), len(head)) for head, rest in unit) for unit in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "LEAST_HEAD", 20)
        found = cut(units, budget=budget, heads=shared_heads(units, SFT))
        sizes = [len(micro_batch(units, c, SFT, device=CPU, heads=shared_heads(units, SFT)).tokens) for c in found]
    assert sorted(u for chosen in found for u in chosen) == list(range(len(units)))
    assert all(size <= budget or len(chosen) == 1 for size, chosen in zip(sizes, found, strict=True))
    assert sum(sizes) <= sum(d.length for u in units for d in u)


def test_a_group_larger_than_a_micro_batch_is_cut_evenly_and_its_head_repeated():
    units = [(datum([1] * 40 + [2] * 10, 40),) for _ in range(8)]
    heads = shared_heads(units, SFT)
    assert sorted(map(len, cut(units, budget=100, heads=heads))) == [4, 4]
    assert len(cut(units, budget=120, heads=heads)) == 1
    assert sorted(map(len, cut(units, budget=100))) == [2, 2, 2, 2]


# -- the same numbers ----------------------------------------------------------------------------------------------------


def batches(trainer, loss):
    """What the loss trains on, and what it takes besides."""
    if loss == "dpo":
        return [{"prompt": p, "chosen": f" {a}", "rejected": f" {b}"} for p in PROMPTS for a, b in ("xy", "zw")], ()
    if loss == "sft":
        system = "user assistant system. " * 3
        return [{"prompt": f"{system}{p}{a}", "completion": f" {a}"} for p in PROMPTS for a in ("xyz", "zw")], ()
    sampler = trainer.save_weights_and_get_sampling_client()
    groups = sampler.sample_batch(PROMPTS, n=3, max_tokens=7, seed=3, stop=[])
    if loss == "grpo":
        return groups, ([[0.0, 1.0, 0.5], [1.0, 0.0, 0.2]],)
    return [c for g in groups for c in g], ([0.1, -1.0, 0.5, 0.3, 0.0, -0.4],)


def run(trainer, loss, patch, least, **plan):
    """Gradient, log-probs and tokens computed, with heads of `least` tokens or more shared."""
    state, seen = inner(trainer), []
    road = state.model.road
    original = type(road).hidden

    def watched(self, tokens, **options):
        seen.append(tokens.shape[0])
        return original(self, tokens, **options)

    patch.setattr(rooms, "LEAST_HEAD", least)
    patch.setattr(type(road), "hidden", watched)
    if plan:
        state.budget = replace(state.budget, choice=replace(state.budget.choice, **plan))
    batch, more = batches(trainer, loss)
    seen.clear()
    result = trainer.forward_backward(batch, *more, loss_fn=loss)
    found = gradient(trainer), [np.asarray(v) for v in result.logprobs], sum(seen)
    state.discard_gradients()
    return found


@pytest.mark.parametrize("loss", ["sft", "dpo", "grpo", "ppo"])
@pytest.mark.parametrize("budget", [None, 100])
def test_sharing_heads_changes_no_gradient_and_no_log_prob(client, monkeypatch, loss, budget):
    (shared, ours, few), (whole, theirs, many) = (
        run(client(micro_batch_tokens=budget), loss, monkeypatch, least) for least in (2, 10**6)
    )
    assert relative(shared, whole) < 1e-11
    assert all(np.abs(a - b).max() < 1e-11 for a, b in zip(ours, theirs, strict=True))
    assert few < many


@pytest.mark.parametrize("level", LEVELS)
def test_at_every_level_of_what_layers_keep(client, monkeypatch, level):
    plan = dict(levels=(level,) * 2, tile=16)
    shared, whole = (run(client(), "grpo", monkeypatch, least, **plan)[0] for least in (2, 10**6))
    assert relative(shared, whole) < 1e-11


def test_a_prompt_is_computed_once_for_its_completions(client, monkeypatch):
    trainer = client()
    prompts = [len(trainer.tokenizer(p).input_ids) for p in PROMPTS]
    _, logprobs, tokens = run(trainer, "grpo", monkeypatch, 2)
    # The last token of a prompt, whose next one is trained, is each completion's own; nothing follows the last of these.
    assert tokens == sum(prompts) - 2 + 6 * 7 and len(logprobs) == 6


def test_a_loss_that_reads_every_token_shares_nothing(client, monkeypatch):
    shared, whole = (run(client(), "importance_sampling", monkeypatch, least) for least in (2, 10**6))
    assert torch.equal(shared[0], whole[0]) and shared[2] == whole[2]


def test_dropout_has_a_mask_for_every_datum_and_shares_nothing(client, monkeypatch):
    shared, whole = (run(client(dropout=0.1), "sft", monkeypatch, least) for least in (2, 10**6))
    assert torch.equal(shared[0], whole[0]) and shared[2] == whole[2]


def test_the_plain_road_takes_whole_documents(tiny_model, monkeypatch):
    from local_tinker import ServiceClient
    from local_tinker.engine.local import LocalEngine

    service = ServiceClient(engine=LocalEngine("cpu", plain_road=True), quiet=True)
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=None, dtype="float32", seed=1)
    shared, whole = (run(trainer, "grpo", monkeypatch, least) for least in (2, 10**6))
    assert torch.equal(shared[0], whole[0]) and shared[2] == whole[2]


def test_texts_whose_length_decides_their_rotation_share_nothing(service, tmp_path, monkeypatch):
    from tests import tiny
    from tests.model.families import LONGROPE

    changes = {"num_attention_heads": 8, "original_max_position_embeddings": 24}
    rope = LONGROPE | {"original_max_position_embeddings": 24}
    folder = tiny.save(tmp_path / "phi3", "phi3", rope_parameters=rope, **changes)
    trainer = service.create_lora_training_client(str(folder), rank=4, quantize=None, dtype="float32", seed=1)
    limit = inner(trainer).model.cached_positions
    rows = [datum(list(range(10, 10 + limit - 3)) + [7, last], limit - 3) for last in (8, 9)]
    longer = [*rows, datum(list(range(10, 10 + limit + 1)), limit - 3)]
    tokens = []
    monkeypatch.setattr(rooms, "LEAST_HEAD", 2)
    for batch in (rows, longer):
        (micro,) = inner(trainer)._micro_batches([(d,) for d in batch], SFT, share=True)
        tokens.append(len(micro.tokens) - sum(d.length for d in batch))
    assert tokens == [-(limit - 3), 0]
