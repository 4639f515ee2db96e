"""SmolLM2-135M-Instruct as users get it: greedy tokens and log-probs beside transformers'."""

import json

import pytest
import torch

from benchmarks import gap
from local_tinker import ServiceClient
from local_tinker.engine.local import LocalEngine
from local_tinker.model.catalogue import resolve

NEW = 12
PROMPTS = [
    "The capital of France is",
    [{"role": "user", "content": "Explain gradient descent simply."}],
    "1, 1, 2, 3, 5, 8,",
    # Longer than a page of the cache, and beginning alike.
    "Once upon a time there was a robot. " * 8 + "It lived in",
    "Once upon a time there was a robot. " * 8 + "One day",
]


@pytest.fixture(scope="module")
def sampler():
    with ServiceClient(engine=LocalEngine("cpu"), quiet=True) as service:
        yield service.create_sampling_client("smollm2-135m", quantize=None, dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m").path, dtype=torch.float32).eval()


def generate(model, tokens):
    """The new tokens transformers' generate gives this prompt alone."""
    ids = torch.tensor([tokens])
    settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(tokens) :].tolist()


def test_greedy_tokens_are_those_of_generate_alone_in_a_batch_and_in_groups(sampler, theirs):
    expected = [generate(theirs, sampler.prompt_tokens(prompt)) for prompt in PROMPTS]
    settings = dict(max_tokens=NEW, temperature=0, stop=[])
    assert [list(sampler.sample(prompt, **settings).tokens) for prompt in PROMPTS[:2]] == expected[:2]
    assert [list(c.tokens) for c in sampler.sample_batch(PROMPTS, **settings)] == expected
    groups = sampler.sample_batch(PROMPTS, n=4, **settings)
    assert [[list(c.tokens) for c in group] for group in groups] == [[tokens] * 4 for tokens in expected]


def test_log_probs_in_fp32_are_those_of_transformers_forward(sampler, theirs):
    settings = dict(max_tokens=NEW, temperature=1.3, top_k=50, seed=3, stop=[])
    for completion in sampler.sample_batch(PROMPTS, **settings):
        ids = torch.tensor([[*completion.prompt_tokens, *completion.tokens]])
        with torch.no_grad():
            table = theirs(ids).logits[0, len(completion.prompt_tokens) - 1 : -1].log_softmax(-1)
        truth = table.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0].tolist()
        assert list(completion.logprobs) == pytest.approx(truth, abs=1e-4)


@pytest.mark.slow
def test_decoding_in_bf16_differs_from_a_forward_no_more_than_transformers_does():
    found = gap.measure("smollm2-135m", "bfloat16", prompts=20, new=16)
    print(json.dumps(found))
    ours, theirs = found["ours"], found["transformers"]
    count = ours["tokens"]
    assert count == theirs["tokens"] == 320
    # What a mean over so few is known to: `benchmarks/results/gap_cpu.json` has ten times as many.
    assert ours["mean_abs"] <= 1.2 * theirs["mean_abs"] and ours["sd"] <= 1.25 * theirs["sd"]
    assert abs(ours["mean"]) <= 0.005 + 2 * ours["sd"] / count**0.5
    assert ours["sd"] <= 0.06 and ours["outside"] <= 0.1
