import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from local_tinker.errors import ModelError
from local_tinker.model.attention import VarlenCausal
from local_tinker.model.linear import FrozenLinear
from local_tinker.model.lora import LoraDropout
from local_tinker.model.plain import PlainRoad, probe, relative_gap
from local_tinker.model.road import FastRoad, collect
from local_tinker.model.spec import spec_for
from tests.model.families import (
    VOCAB,
    CacheAttend,
    config_of,
    empty_sink,
    freeze,
    packed_positions,
    random_pairs,
    random_tokens,
    tiny,
)

EDGES = [0, 9, 29, 36]
COUNT = EDGES[-1]
NAMES = ["llama_biases", "mistral", "gemma2", "gemma3_text", "phi3", "phi3_longrope", "olmo2"]


def roads_of(name):
    model = tiny(name)
    frozen = freeze(model)
    spec = spec_for(model.config)
    return FastRoad(spec, collect(model, spec)), PlainRoad(model), frozen


def run(road, tokens, edges=EDGES, *, positions=None, attend=None, pairs=None, scale=0.5, **options):
    positions = packed_positions(list(edges)) if positions is None else positions
    attend = attend or VarlenCausal(edges, "cpu")
    return road.hidden(tokens, positions=positions, attend=attend, pairs=pairs or {}, scale=scale, **options)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False).eval()
    model.transformer.wpe.weight.data.normal_()
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            weight = module.weight.data.t().contiguous() * 8
            frozen = FrozenLinear(weight, module.bias.data, quantize=None, dtype=torch.float32, path=path)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, frozen)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_both_roads_agree_with_adapters_values_and_gradients(name):
    fast, plain, frozen = roads_of(name)
    tokens, results = random_tokens(COUNT), []
    for road in (fast, plain):
        pairs = random_pairs(frozen)
        sink = empty_sink(pairs)
        out = run(road, tokens, pairs=pairs, sink=sink)
        out.sin().sum().backward()
        results.append([out, *(t for pair in sink.values() for t in pair)])
    for ours, theirs in zip(*results, strict=True):
        assert relative_gap(ours, theirs) < 1e-5


def test_no_pairs_is_the_base_alone_before_and_after_adapters():
    _, plain, frozen = roads_of("llama")
    tokens = random_tokens(COUNT)
    base = run(plain, tokens)
    adapted = run(plain, tokens, pairs=random_pairs(frozen))
    assert relative_gap(adapted, base) > 0.1
    assert torch.equal(run(plain, tokens), base)


def test_a_call_leaves_neither_adapter_nor_reference_in_the_model():
    _, plain, frozen = roads_of("llama")
    tokens, pairs = random_tokens(COUNT), random_pairs(frozen)
    base = plain.model.model(input_ids=tokens[None], use_cache=False).last_hidden_state
    run(plain, tokens, pairs=pairs, levels=["layer"] * 3, sink=empty_sink(pairs)).sum().backward()
    assert torch.equal(plain.model.model(input_ids=tokens[None], use_cache=False).last_hidden_state, base)
    watched = [weakref.ref(t) for pair in pairs.values() for t in pair]
    del pairs
    gc.collect()
    assert not any(reference() is not None for reference in watched)


def test_rows_of_equal_documents_drop_different_entries():
    _, plain, frozen = roads_of("phi3_longrope")
    tokens, pairs, edges = random_tokens(9).repeat(2), random_pairs(frozen), [0, 9, 18]
    whole = run(plain, tokens, edges, pairs=pairs)
    assert torch.equal(whole[:9], whole[9:])
    dropped = run(plain, tokens, edges, pairs=pairs, dropout=LoraDropout(0.5, seeds=(1, 2), lengths=(9, 9)))
    assert relative_gap(dropped[:9], dropped[9:]) > 0.05


def test_several_adapters_share_one_model_whatever_their_rank_and_targets():
    fast, plain, frozen = roads_of("llama")
    tokens = random_tokens(COUNT)
    narrow = {path: frozen[path] for path in frozen if "q_proj" in path or "down_proj" in path}
    adapters = [random_pairs(frozen, rank=2, seed=5), random_pairs(narrow, rank=6, seed=6), {}]
    for pairs, scale in [(adapters[0], 0.5), (adapters[1], 2.0), (adapters[2], 1.0), (adapters[0], 0.25)]:
        assert (
            relative_gap(run(plain, tokens, pairs=pairs, scale=scale), run(fast, tokens, pairs=pairs, scale=scale))
            < 1e-6
        )


@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
def test_recompute_finds_the_adapter_of_its_own_call(name):
    fast, plain, frozen = roads_of(name)
    tokens, dropout, grads = (
        random_tokens(COUNT),
        LoraDropout(0.25, seeds=tuple(range(len(EDGES) - 1)), lengths=tuple(j - i for i, j in pairwise(EDGES))),
        [],
    )
    for road, level in ((fast, "norms"), (plain, "norms"), (plain, "layer")):
        pairs = random_pairs(frozen)
        sink = empty_sink(pairs)
        out = run(road, tokens, pairs=pairs, levels=[level] * 3, dropout=dropout, sink=sink)
        with torch.no_grad():  # a reference pass before backward must not disturb it
            run(road, tokens, pairs=random_pairs(frozen, seed=9), scale=3.0)
            run(road, tokens)
        out.sin().sum().backward()
        grads.append([t for pair in sink.values() for t in pair])
    assert all(torch.equal(a, b) for a, b in zip(grads[1], grads[2], strict=True))
    assert all(relative_gap(a, b) < 1e-5 for a, b in zip(grads[0], grads[1], strict=True))


def test_recompute_keeps_fewer_tensors():
    _, plain, frozen = roads_of("llama")
    kept = []
    for level in ("norms", "layer"):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            pairs = random_pairs(frozen)
            run(plain, random_tokens(COUNT), pairs=pairs, levels=[level] * 3, sink=empty_sink(pairs))
        kept.append(sum(sizes))
    assert kept[1] < 0.3 * kept[0]


def test_collect_sees_through_injected_adapters():
    fast, plain, frozen = roads_of("llama")
    tokens, pairs = random_tokens(COUNT), random_pairs(frozen)
    before = run(fast, tokens, pairs=pairs)
    run(plain, tokens, pairs=pairs)
    again = FastRoad(fast.spec, collect(plain.model, fast.spec))
    assert torch.equal(run(fast, tokens, pairs=pairs), before) and torch.equal(run(again, tokens, pairs=pairs), before)
    assert not any(parameter.requires_grad for parameter in plain.model.parameters())


def test_gpt2_learned_positions_restart_with_each_packed_document():
    model, tokens = gpt2(), random_tokens(COUNT)
    alone = [model.transformer(tokens[None, i:j], use_cache=False).last_hidden_state[0] for i, j in pairwise(EDGES)]
    road = PlainRoad(model)
    assert road.packed
    torch.testing.assert_close(run(road, tokens), torch.cat(alone), rtol=1e-5, atol=1e-5)
    shifted = run(road, tokens[:9], (0, 9), positions=torch.arange(4, 13))
    assert relative_gap(shifted, alone[0]) > 0.1


def test_gpt2_adapters_train_through_peft():
    model = gpt2()
    frozen = {path: module for path, module in model.named_modules() if isinstance(module, FrozenLinear)}
    road, tokens, pairs = PlainRoad(model), random_tokens(COUNT), random_pairs(frozen)
    sink = empty_sink(pairs)
    run(road, tokens, pairs=pairs, sink=sink).sin().sum().backward()
    path = "transformer.h.1.mlp.c_fc"
    a, b = pairs[path]
    step = torch.randn(b.shape, generator=torch.Generator().manual_seed(1)) * 1e-2
    with torch.no_grad():
        ends = [run(road, tokens, pairs=pairs | {path: (a, b + sign * step)}).double().sin().sum() for sign in (1, -1)]
    assert ((ends[0] - ends[1]) / 2).item() == pytest.approx((sink[path][1] * step).sum().item(), rel=2e-3)


@pytest.mark.parametrize("make", [lambda: tiny("gemma2"), gpt2], ids=["gemma2", "gpt2"])
def test_the_plain_road_decodes_with_a_cache(make):
    road, tokens = PlainRoad(make()), random_tokens(COUNT)
    whole, cache = run(road, tokens), CacheAttend([])
    lengths = [9, 20, 7]
    for step in range(20):
        cache.slots = [slot for slot in (1, 2, 0) if step < lengths[slot]]
        rows = [EDGES[slot] + step for slot in cache.slots]
        out = run(road, tokens[rows], attend=cache, positions=torch.full((len(rows),), step))
        torch.testing.assert_close(out, whole[rows], rtol=1e-5, atol=1e-5)


def test_a_model_outside_the_attention_interface_runs_one_document_a_row():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False).eval()
    tokens = random_tokens(COUNT)
    alone = [model.transformer(tokens[None, i:j], use_cache=False).last_hidden_state[0] for i, j in pairwise(EDGES)]
    road = PlainRoad(model)
    assert not road.packed and road.reason
    torch.testing.assert_close(run(road, tokens), torch.cat(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="one document a row"):
        run(road, tokens[:1], attend=CacheAttend([0]), positions=torch.tensor([0]))


def test_a_model_that_hides_its_window_from_attention_runs_one_document_a_row():
    model = tiny(config_of("mistral", sliding_window=20))  # longer than the documents of the check

    class Hiding:
        sliding_window = None  # the mask that the model builds for its own attention still has it

        def __getattr__(self, name):
            return getattr(model.config, name)

    for layer in model.model.layers:
        layer.self_attn.config = Hiding()
    road = PlainRoad(model)
    assert not road.packed and "windows" in road.reason


def test_rotary_kinds_that_follow_the_length_are_not_packed():
    assert "length of a document" in PlainRoad(tiny("phi3_longrope")).reason


def test_the_probe_measures_the_gap():
    fast, plain, _ = roads_of("gemma2")
    agrees, gap = probe(fast, plain, random_tokens(64), tolerance=1e-4)
    assert agrees and gap < 1e-6


@pytest.mark.parametrize("wrong", ["norm", "packing", "scale"])
def test_the_probe_finds_a_wrong_road(wrong):
    fast, plain, _ = roads_of("gemma2")
    if wrong == "norm":
        object.__setattr__(fast.spec, "norm", "scale_then_round")
    elif wrong == "scale":
        object.__setattr__(fast.spec, "attention_scale", fast.spec.attention_scale * 1.1)
    else:
        inner = fast.hidden
        fast.hidden = lambda tokens, **kw: inner(tokens, **kw | {"attend": VarlenCausal([0, tokens.shape[0]], "cpu")})
    agrees, gap = probe(fast, plain, random_tokens(64), tolerance=1e-4)
    assert not agrees and gap > 1e-3


def test_a_path_that_is_no_projection_is_refused():
    _, plain, frozen = roads_of("llama")
    pair = next(iter(random_pairs(frozen).values()))
    with pytest.raises(ModelError, match="lm_head"):
        run(plain, random_tokens(COUNT), pairs={"lm_head": pair})
    assert isinstance(plain.model.lm_head, nn.Linear)
