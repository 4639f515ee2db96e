"""The whole engine on every family against transformers' own generate."""

import pytest
import torch

from local_tinker.model.decode import DecodeRoad
from local_tinker.model.head import Head
from local_tinker.model.road import FastRoad, collect
from local_tinker.model.spec import spec_for
from local_tinker.sampler.decode import SamplerEngine
from local_tinker.sampler.sequence import Request, SamplingParams
from tests.model.families import FAMILIES, VOCAB, freeze, random_pairs, random_tokens, tiny

NEW = 20
# Frequencies that follow the length of a text: the engine ends such texts before they change.
SHORT = {"phi3_longrope": 12}


def fast(name, *, dtype=torch.float32):
    model = tiny(name, dtype=dtype)
    spec = spec_for(model.config)
    frozen = freeze(model)
    head = Head(
        weight=model.get_output_embeddings().weight.data,
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )
    return model, FastRoad(spec, collect(model, spec)), head, frozen


def engine(road, head, *, positions=64, **changes):
    spec = road.spec
    settings = dict(
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=head.weight.dtype,
        device=head.weight.device,
        max_rows=8,
        token_budget=4096,
        max_positions=positions,
        vocab_size=VOCAB,
        fused=DecodeRoad(road),
    )
    return SamplerEngine(road, head, **{**settings, **changes})


def prompts():
    return [tuple(random_tokens(length, seed=length).tolist()) for length in (1, 7, 23)]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_generate(name):
    model, road, head, _ = fast(name)
    new = NEW if name not in SHORT else 3
    asked = [p for p in prompts() if name not in SHORT or len(p) + new <= SHORT[name]]
    requests = [Request(p, SamplingParams(temperature=0, max_tokens=new), n=1 + i % 2) for i, p in enumerate(asked)]
    results = engine(road, head).collect(requests, pairs={}, scale=1.0)
    for tokens, group in zip(asked, results, strict=True):
        ids = torch.tensor([tokens])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert all(list(f.tokens) == expected[0, len(tokens) :].tolist() for f in group)


@pytest.mark.parametrize("name", ["llama_biases", "qwen3", "gemma2", "phi3", "olmo2"])
@pytest.mark.parametrize("rank", [3, 20])
def test_adapted_log_probs_are_those_of_the_training_layer(name, rank):
    _, road, head, frozen = fast(name)
    pairs = random_pairs(frozen, rank=rank)
    partly = {path: pair for i, (path, pair) in enumerate(pairs.items()) if i % 3}
    sampler = engine(road, head)
    for adapter in (pairs, partly, {}):
        requests = [Request(p, SamplingParams(max_tokens=NEW, seed=4), n=2) for p in prompts()]
        for group in sampler.collect(requests, pairs=adapter, scale=0.3):
            for finished in group:
                whole = [*finished.prompt_tokens, *finished.tokens]
                with torch.no_grad():
                    scores = engine(road, head).prompt_logprobs(whole, pairs=adapter, scale=0.3)
                assert finished.logprobs == pytest.approx(scores[len(finished.prompt_tokens) :], abs=1e-4)
