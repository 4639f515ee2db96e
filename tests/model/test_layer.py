import copy
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from local_tinker.errors import ModelError
from local_tinker.model.attention import ATTENTION_NAME, VarlenCausal, register
from local_tinker.model.levels import LEVELS
from local_tinker.model.lora import LoraDropout
from local_tinker.model.road import FastRoad, collect, text_decoder
from local_tinker.model.spec import spec_for
from tests.model.families import (
    FAMILIES,
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


def road_of(model):
    frozen = freeze(model)
    spec = spec_for(model.config)
    return FastRoad(spec, collect(model, spec)), frozen


def run(road, tokens, edges=(0, COUNT), *, positions=None, attend=None, pairs=None, scale=1.0, **options):
    positions = packed_positions(list(edges)) if positions is None else positions
    attend = attend or VarlenCausal(edges, "cpu")
    return road.hidden(tokens, positions=positions, attend=attend, pairs=pairs or {}, scale=scale, **options)


def eager(model, tokens, edges=EDGES):
    """transformers' modules with their eager attention, a document at a time."""
    _, decoder = text_decoder(model)
    return torch.cat(
        [decoder(input_ids=tokens[None, i:j], use_cache=False).last_hidden_state[0] for i, j in pairwise(edges)]
    )


def assert_near(ours, theirs, tolerance):
    gap = ((ours - theirs).norm() / theirs.norm()).item()
    assert gap < tolerance, f"relative difference {gap:.3g}"


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_hidden_states_equal_transformers_on_separate_documents(name):
    model, tokens = tiny(name), random_tokens(COUNT)
    expected = eager(model, tokens)
    road, _ = road_of(model)
    torch.testing.assert_close(run(road, tokens, EDGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_lora_pairs_equal_peft(name):
    from peft import LoraConfig, get_peft_model

    model, tokens = tiny(name), random_tokens(COUNT)
    weights = torch.randn(COUNT, 32, generator=torch.Generator().manual_seed(3))
    theirs = copy.deepcopy(model)
    road, frozen = road_of(model)
    pairs = random_pairs(frozen)
    sink = empty_sink(pairs)
    (run(road, tokens, EDGES, pairs=pairs, scale=0.5, sink=sink) * weights).sum().backward()

    config = LoraConfig(r=3, lora_alpha=1.5, target_modules=list(frozen))
    peft = get_peft_model(theirs, config)
    layers = {path: theirs.get_submodule(path) for path in frozen}
    with torch.no_grad():
        for path, layer in layers.items():
            layer.lora_A["default"].weight.copy_(pairs[path][0])
            layer.lora_B["default"].weight.copy_(pairs[path][1])
    (eager(peft.base_model.model, tokens) * weights).sum().backward()
    for path, layer in layers.items():
        assert_near(sink[path][0], layer.lora_A["default"].weight.grad, 1e-5)
        assert_near(sink[path][1], layer.lora_B["default"].weight.grad, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_at_every_level_are_the_same_bits(name):
    road, frozen = road_of(tiny(name))
    tokens, grads = random_tokens(COUNT), []
    for level in LEVELS:
        pairs = random_pairs(frozen)
        sink = empty_sink(pairs)
        dropout = LoraDropout(
            0.25, seeds=(7, 8, 9, 10)[: len(EDGES) - 1], lengths=tuple(j - i for i, j in pairwise(EDGES))
        )
        levels = [level] * road.spec.layers
        run(road, tokens, EDGES, pairs=pairs, levels=levels, dropout=dropout, sink=sink).sin().sum().backward()
        grads.append([t for pair in sink.values() for t in pair])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
    assert all(float(t.abs().max()) > 0 for t in grads[0])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "phi3"])
def test_an_mlp_in_tiles_gives_the_same_gradient(name):
    road, frozen = road_of(tiny(name, dtype=torch.float64))
    tokens, found = random_tokens(COUNT), []
    for tile in (COUNT, 5):
        pairs = random_pairs(frozen)
        sink = empty_sink(pairs)
        out = run(road, tokens, EDGES, pairs=pairs, levels=["layer"] * road.spec.layers, sink=sink, tile=tile)
        out.sin().sum().backward()
        found.append([out.detach(), *(t for pair in sink.values() for t in pair)])
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_chosen_rows_give_the_hidden_states_and_gradients_of_those_rows(name):
    road, frozen = road_of(tiny(name, dtype=torch.float64))
    tokens, rows = random_tokens(COUNT), torch.tensor([0, 3, 10, 11, 35])
    weights = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pairs = random_pairs(frozen)
    sinks = [empty_sink(pairs), empty_sink(pairs)]
    whole = run(road, tokens, EDGES, pairs=pairs, sink=sinks[0])[rows]
    chosen = run(road, tokens, EDGES, pairs=pairs, sink=sinks[1], rows=rows)
    torch.testing.assert_close(chosen, whole, rtol=1e-12, atol=1e-12)
    for out in (whole, chosen):
        (out * weights).sum().backward()
    for path in pairs:
        torch.testing.assert_close(sinks[0][path], sinks[1][path], rtol=1e-10, atol=1e-10)


def test_an_adapter_on_upper_layers_alone_gets_the_same_gradient_as_among_all():
    road, frozen = road_of(tiny("llama", dtype=torch.float64))
    tokens, pairs = random_tokens(COUNT), random_pairs(frozen)
    few = {path: pair for path, pair in pairs.items() if "layers.2" in path and "k_proj" not in path}
    zeroed = {path: pair if path in few else (pair[0], torch.zeros_like(pair[1])) for path, pair in pairs.items()}
    sinks = [empty_sink(few), empty_sink(pairs)]
    for some, sink in ((few, sinks[0]), (zeroed, sinks[1])):
        run(road, tokens, EDGES, pairs=some, sink=sink).sin().sum().backward()
    for path in few:
        torch.testing.assert_close(sinks[0][path], sinks[1][path], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_fp64_packed_equals_separate_and_gradients_equal_finite_differences(name):
    model, tokens = tiny(name, dtype=torch.float64), random_tokens(COUNT)
    expected = eager(model, tokens)
    road, frozen = road_of(model)
    pairs = random_pairs(frozen)
    sink = empty_sink(pairs)
    packed = run(road, tokens, EDGES, pairs=pairs, sink=sink)
    alone = torch.cat([run(road, tokens[i:j], (0, j - i), pairs=pairs) for i, j in pairwise(EDGES)])
    torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-11)
    # transformers normalises and takes its softmax in fp32 whatever the type.
    torch.testing.assert_close(run(road, tokens, EDGES), expected, rtol=2e-6, atol=2e-6)

    path = list(pairs)[1]
    a = pairs[path][0]
    packed.sin().sum().backward()
    slope = sink[path][0]
    step = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(4))
    ends = [
        run(road, tokens, EDGES, pairs=pairs | {path: (a + sign * 2e-6 * step, pairs[path][1])}).sin().sum()
        for sign in (1, -1)
    ]
    assert ((ends[0] - ends[1]) / 4e-6).item() == pytest.approx((slope * step).sum().item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name != "phi3_longrope"]
)  # its rotation follows the length
def test_decoding_one_token_of_each_document_at_a_time_equals_the_full_forward(name):
    road, frozen = road_of(tiny(name))
    pairs, tokens, lengths = random_pairs(frozen), random_tokens(COUNT), [9, 20, 7]
    whole = run(road, tokens, EDGES, pairs=pairs)
    cache = CacheAttend([])
    for step in range(20):
        cache.slots = [slot for slot in (2, 0, 1) if step < lengths[slot]]  # the order of a batch means nothing
        rows = [EDGES[slot] + step for slot in cache.slots]
        positions = torch.full((len(rows),), step)
        out = run(road, tokens[rows], attend=cache, positions=positions, pairs=pairs)
        torch.testing.assert_close(out, whole[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bf16_the_rounding_points_are_those_of_transformers(name):
    """Against its modules with our attention a tenth of bf16's noise is allowed; against eager attention all of it."""
    model, tokens = tiny(name, dtype=torch.bfloat16), random_tokens(COUNT)
    with_eager = eager(model, tokens)
    register()
    model.set_attn_implementation(ATTENTION_NAME)
    with_ours = eager(model, tokens)
    road, _ = road_of(model)
    ours = run(road, tokens, EDGES)
    assert ours.dtype == torch.bfloat16
    assert_near(ours.float(), with_ours.float(), 1e-3)
    assert_near(ours.float(), with_eager.float(), 0.02)


def test_a_multimodal_gemma3_runs_its_text_part():
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = config_of("gemma3_text").to_dict()
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False).eval()
    tokens = random_tokens(COUNT)
    expected = eager(model, tokens)
    road, frozen = road_of(model)
    prefix, _ = text_decoder(model)
    pairs = random_pairs({path: linear for path, linear in frozen.items() if path.startswith(prefix)})
    torch.testing.assert_close(run(road, tokens, EDGES), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(road, tokens, EDGES, pairs=pairs), expected, atol=0.1)


def test_weights_are_the_models_own_tensors():
    model = tiny("llama")
    road, frozen = road_of(model)
    assert road.weights.embedding.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert road.weights.layers[1].qkv.linears[2] is frozen["model.layers.1.self_attn.v_proj"]
    assert (
        road.weights.layers[2].before_mlp.data_ptr() == model.model.layers[2].post_attention_layernorm.weight.data_ptr()
    )


def test_an_adapter_of_another_model_is_refused():
    road, frozen = road_of(tiny("llama"))
    pair = next(iter(random_pairs(frozen).values()))
    with pytest.raises(ModelError, match="layers.9"):
        run(road, random_tokens(COUNT), pairs={"model.layers.9.self_attn.q_proj": pair})


def test_projections_that_are_not_frozen_are_refused():
    model = tiny("llama")
    with pytest.raises(ModelError, match="q_proj is Linear"):
        collect(model, spec_for(model.config))
