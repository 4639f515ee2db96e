"""The sampling engine on a card: captured steps and kernels against the same engine on a CPU."""

import pytest
import torch

from local_tinker.model.decode import DecodeRoad
from local_tinker.sampler.sequence import Request, SamplingParams
from local_tinker.sampler.stop import StopRules
from tests.model.families import FAMILIES, random_pairs
from tests.sampler.test_greedy import SHORT, engine, fast, prompts

pytestmark = pytest.mark.gpu


def on_card(name, *, dtype=torch.float32, **changes):
    model, road, head, frozen = fast(name, dtype=dtype)
    del road
    model.to("cuda")
    from local_tinker.model.head import Head
    from local_tinker.model.road import FastRoad, collect
    from local_tinker.model.spec import spec_for

    for linear in frozen.values():
        linear.share(linear.weight.data)
        linear.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.data, requires_grad=False)
    spec = spec_for(model.config)
    road = FastRoad(spec, collect(model, spec))
    head = Head(weight=model.get_output_embeddings().weight.data, softcap=head.softcap)
    sampler = engine(road, head, fused=DecodeRoad(road), **changes)
    sampler.keep_bytes = 2**30
    return sampler, frozen


def requests(new=24, **settings):
    return [
        Request(p, SamplingParams(max_tokens=new, seed=7, **settings), n=1 + 2 * i) for i, p in enumerate(prompts())
    ]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_draws_on_the_card_what_it_draws_on_a_cpu(name, temperature):
    new = 24 if name not in SHORT else 3
    asked = requests(new, temperature=temperature)[: 3 if name not in SHORT else 2]
    _, road, head, _ = fast(name)
    expected = engine(road, head).collect(asked, pairs={}, scale=1.0)
    sampler, _ = on_card(name)
    for _ in range(2):  # the second run replays what the first captured
        found = sampler.collect(asked, pairs={}, scale=1.0)
        for mine, theirs in zip(found, expected, strict=True):
            assert [f.tokens for f in mine] == [f.tokens for f in theirs]
            for a, b in zip(mine, theirs, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_adapters_change_between_runs_without_a_new_capture():
    sampler, frozen = on_card("llama")
    asked = requests()
    for seed in (1, 2, 1):
        pairs = {p: (a.cuda(), b.cuda()) for p, (a, b) in random_pairs(frozen, rank=4, seed=seed).items()}
        found = sampler.collect(asked, pairs=pairs, scale=0.3)
        for finished in (f for group in found for f in group):
            whole = [*finished.prompt_tokens, *finished.tokens]
            scores = sampler.prompt_logprobs(whole, pairs=pairs, scale=0.3)
            assert finished.logprobs == pytest.approx(scores[len(finished.prompt_tokens) :], abs=1e-4)


def test_stop_ids_filters_and_a_full_cache():
    sampler, _ = on_card("llama", token_budget=64 * 14, max_rows=6)
    cpu_road = fast("llama")
    asked = [
        Request(
            p,
            SamplingParams(max_tokens=40, seed=i, top_k=9 if i % 2 else None, temperature=0.8),
            StopRules(frozenset({5, 9})),
            n=5,
        )
        for i, p in enumerate(prompts() * 2)
    ]
    expected = engine(cpu_road[1], cpu_road[2]).collect(asked, pairs={}, scale=1.0)
    found = sampler.collect(asked, pairs={}, scale=1.0)
    assert [[f.tokens for f in g] for g in found] == [[f.tokens for f in g] for g in expected]
    assert {f.stop_reason for g in found for f in g} == {"stop", "length"}


def test_deterministic_bits_do_not_depend_on_the_batch():
    sampler, _ = on_card("llama_biases", dtype=torch.bfloat16)
    asked = requests(30)
    together = sampler.collect(asked, pairs={}, scale=1.0, deterministic=True)
    for request, group in zip(asked, together, strict=True):
        (alone,) = sampler.collect([request], pairs={}, scale=1.0, deterministic=True)
        assert [f.tokens for f in alone] == [f.tokens for f in group]
        assert [f.logprobs for f in alone] == [f.logprobs for f in group]


def test_an_interrupted_run_leaves_the_engine_usable_and_memory_flat():
    sampler, _ = on_card("llama")
    expected = sampler.collect(requests(), pairs={}, scale=1.0)
    seen = []
    for _ in range(20):
        events = sampler.run(requests(), pairs={}, scale=1.0, pauses=True)
        for _ in range(3):
            next(events)
        events.close()
        found = sampler.collect(requests(), pairs={}, scale=1.0)
        assert [[f.tokens for f in g] for g in found] == [[f.tokens for f in g] for g in expected]
        torch.cuda.synchronize()
        seen.append(torch.cuda.memory_allocated())
    assert max(seen[2:]) - min(seen[2:]) < 2**20
