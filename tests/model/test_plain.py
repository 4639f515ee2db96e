import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from local_tinker.errors import ModelError
from local_tinker.model import plain as plain_module
from local_tinker.model.agree import Seen, largest_gap, relative_gap
from local_tinker.model.attention import VarlenCausal
from local_tinker.model.linear import FrozenLinear
from local_tinker.model.lora import LoraDropout
from local_tinker.model.plain import PlainRoad, probe
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


def test_a_model_that_runs_a_layer_twice_runs_one_document_a_row():
    model, tokens = gpt2(), random_tokens(COUNT)
    model.transformer.h[1] = model.transformer.h[0]
    alone = [model.transformer(tokens[None, i:j], use_cache=False).last_hidden_state[0] for i, j in pairwise(EDGES)]
    road = PlainRoad(model)
    assert not road.packed and "layer 0 of its decoder runs 4 times in 2 passes" in road.reason
    torch.testing.assert_close(run(road, tokens), torch.cat(alone), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("wrong", ["norm", "packing", "scale", "embedding", "final norm", "order"])
def test_the_probe_finds_a_wrong_road(wrong):
    fast, plain, _ = roads_of("gemma2")
    if wrong == "norm":
        object.__setattr__(fast.spec, "norm", "scale_then_round")
    elif wrong == "scale":
        object.__setattr__(fast.spec, "attention_scale", fast.spec.attention_scale * 1.1)
    elif wrong == "embedding":
        fast.embedding_scale *= 1.01
    elif wrong == "final norm":
        object.__setattr__(fast.weights, "final_norm", fast.weights.final_norm + 0.01)
    elif wrong == "order":  # every layer is right by itself
        inner = fast.hidden
        fast.hidden = lambda tokens, **kw: inner(tokens, **kw).flip(0)
    else:
        inner = fast.watched
        fast.watched = lambda tokens, seen, **kw: inner(
            tokens, seen, **kw | {"attend": VarlenCausal([0, tokens.shape[0]], "cpu")}
        )
    agrees, gap = probe(fast, plain, random_tokens(64), tolerance=1e-4)
    assert not agrees and gap > 1e-3


class Noisy(VarlenCausal):
    """As far from the same attention in another order of sums as bf16 may be."""

    def __call__(self, *args, **options):
        out = super().__call__(*args, **options)
        return out * (1 + 2**-8 * torch.randn_like(out))


class Leaking(Noisy):
    """And tokens see the document before theirs from layer 60 on."""

    def __call__(self, layer, *args, **options):
        whole = self if layer < 60 else Noisy([0, self.cu_seqlens[-1]], "cpu")
        return Noisy.__call__(whole, layer, *args, **options)


def deep_bf16():
    """Of a kind through which differences grow."""
    model = tiny(config_of("llama", num_hidden_layers=64), dtype=torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in parameter_name:
            parameter.data *= 4
    freeze(model)
    spec = spec_for(model.config)
    return FastRoad(spec, collect(model, spec)), model


def test_rounding_that_grows_through_a_deep_model_is_no_disagreement(monkeypatch):
    monkeypatch.setattr(plain_module, "VarlenCausal", Noisy)
    fast, model = deep_bf16()
    plain, tokens = PlainRoad(model), random_tokens(64)
    assert plain.packed, plain.reason
    call = dict(positions=packed_positions([0, 40, 64]), attend=Noisy([0, 40, 64], "cpu"))
    ours, theirs = (road.hidden(tokens, **call, pairs={}, scale=1.0) for road in (fast, plain))
    assert relative_gap(ours, theirs) > 0.15  # whole passes could not be told from wrong ones
    agrees, gap = probe(fast, plain, tokens, tolerance=5e-2)
    assert agrees and gap < 4e-2


def test_a_mistake_in_a_late_layer_of_a_deep_model_is_found(monkeypatch):
    monkeypatch.setattr(plain_module, "VarlenCausal", Noisy)
    fast, model = deep_bf16()
    plain, weights = PlainRoad(model), fast.weights.layers[60]
    object.__setattr__(weights, "before_mlp", weights.before_mlp * 1.2)
    agrees, gap = probe(fast, plain, random_tokens(64), tolerance=5e-2)
    assert not agrees and gap > 0.06
    monkeypatch.setattr(plain_module, "VarlenCausal", Leaking)
    assert "packed documents differ" in PlainRoad(deep_bf16()[1]).reason


def test_gaps_are_of_the_worst_part_and_of_what_a_layer_adds():
    given, made = torch.zeros(4, 4), torch.full((4, 4), 2.0)
    theirs = Seen((given, made), (made, 3 * made), made)
    assert largest_gap(theirs, theirs) == 0.0
    wrong = 3 * made
    wrong = torch.cat([wrong[:3], wrong[3:] * 1.1])
    found = largest_gap(Seen(theirs.given, (made, wrong), made), theirs)
    assert found == pytest.approx(0.15 / 2)  # one token of four by 0.6 where a layer adds 4
    assert largest_gap(Seen((given + 0.1, made), theirs.made, made), theirs) > 0.1
    assert largest_gap(Seen(theirs.given, theirs.made, made * 1.2), theirs) == pytest.approx(0.2)
    assert not largest_gap(Seen(theirs.given, (made, wrong * torch.nan), made), theirs) <= 1e9


def test_a_path_that_is_no_projection_is_refused():
    _, plain, frozen = roads_of("llama")
    pair = next(iter(random_pairs(frozen).values()))
    with pytest.raises(ModelError, match="lm_head"):
        run(plain, random_tokens(COUNT), pairs={"lm_head": pair})
    assert isinstance(plain.model.lm_head, nn.Linear)
