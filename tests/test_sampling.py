"""The sampling client on a tiny model: snapshots, exact log-probs, seeds, forms of prompts."""

import pickle

import numpy as np
import pytest
import torch

from local_tinker import Completion, ModelInput
from local_tinker.errors import StateError, UsageError
from tests.test_training import ROWS, inner, warm

CHAT = [{"role": "user", "content": "What is one plus two?"}]
PROMPTS = [CHAT, [{"role": "user", "content": "the fox"}], "the quick", [5, 6, 7, 8]]


@pytest.fixture
def trainer(service, tiny_model):
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=None, dtype="float32", seed=3)
    warm(trainer)
    return trainer


@pytest.fixture
def sampler(trainer):
    return trainer.save_weights_and_get_sampling_client()


def test_the_logprobs_of_a_completion_are_those_the_trainer_computes(trainer, sampler):
    for settings in ({}, {"temperature": 0.3, "top_p": 0.5, "top_k": 3}, {"temperature": 0}):
        completion = sampler.sample(CHAT, max_tokens=12, seed=1, **settings)
        tokens = [*completion.prompt_tokens, *completion.tokens]
        scored = sampler.compute_logprobs(tokens)
        assert scored[0] is None
        start = len(completion.prompt_tokens)
        assert np.allclose(scored[start:], completion.logprobs, atol=1e-4)
        assert trainer_logprobs(trainer, completion) == pytest.approx(completion.logprobs, abs=1e-4)


def trainer_logprobs(trainer, completion):
    from local_tinker import Datum

    tokens = [*completion.prompt_tokens, *completion.tokens]
    datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    (logprobs,) = trainer.forward([datum], "cross_entropy").logprobs
    return logprobs[len(completion.prompt_tokens) - 1 :].tolist()


def test_a_sampler_keeps_its_own_weights_while_training_goes_on(trainer, sampler):
    before = [sampler.sample(p, max_tokens=10, seed=4) for p in PROMPTS]
    scores = sampler.compute_logprobs(CHAT)
    for _ in range(3):
        trainer.forward_backward(ROWS)
        trainer.optim_step(learning_rate=0.05)
    after = [sampler.sample(p, max_tokens=10, seed=4) for p in PROMPTS]
    for a, b in zip(before, after, strict=True):
        assert (a.tokens, a.logprobs) == (b.tokens, b.logprobs)
    assert sampler.compute_logprobs(CHAT) == scores
    newer = trainer.save_weights_and_get_sampling_client()
    assert newer.weights_version != sampler.weights_version
    assert newer.compute_logprobs(CHAT) != scores


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_between_two_forward_backward_calls_changes_no_gradient_bit(service, tiny_model, quantize, dtype):
    def run(sample):
        trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=quantize, dtype=dtype, seed=3)
        warm(trainer)
        trainer.forward_backward(ROWS)
        state = torch.random.get_rng_state()
        if sample:
            client = trainer.save_weights_and_get_sampling_client()
            client.sample_batch(PROMPTS, n=3, max_tokens=6)
            client.compute_logprobs(CHAT)
        assert torch.equal(torch.random.get_rng_state(), state)
        trainer.forward_backward(ROWS)
        return inner(trainer).window.gradient().clone(), [p.digest() for p in inner(trainer).model.projections.values()]

    plain, sampled = run(False), run(True)
    assert torch.equal(plain[0], sampled[0]) and plain[1] == sampled[1]


@pytest.mark.parametrize("plain_road", [False, True])
def test_a_sample_is_drawn_without_dropout_and_leaves_training_with_it(tiny_model, plain_road):
    from local_tinker import ServiceClient
    from local_tinker.engine.local import LocalEngine

    losses = []
    with ServiceClient(engine=LocalEngine("cpu", plain_road=plain_road), quiet=True) as service:
        for sampled in (True, False):
            trainer = service.create_lora_training_client(
                str(tiny_model), rank=4, quantize=None, dtype="float32", seed=3, dropout=0.5
            )
            warm(trainer)
            plain = float(trainer.forward(ROWS))
            if sampled:
                client = trainer.save_weights_and_get_sampling_client()
                one, two = (client.sample(CHAT, max_tokens=8, seed=1, stop=[]) for _ in range(2))
                assert (one.tokens, one.logprobs) == (two.tokens, two.logprobs)
                assert trainer_logprobs(trainer, one) == pytest.approx(one.logprobs, abs=1e-4)
            losses.append(float(trainer.forward_backward(ROWS)))
            assert abs(losses[-1] - plain) > 0.01
    assert losses[0] == losses[1]


def test_the_plain_road_samples_in_evaluation_mode_and_leaves_every_flag(tmp_path):
    from local_tinker import ServiceClient
    from local_tinker.engine.local import LocalEngine
    from tests import tiny

    folder = tiny.save(tmp_path / "model", attention_dropout=0.5)
    engine = LocalEngine("cpu", plain_road=True)
    with ServiceClient(engine=engine, quiet=True) as service:
        client = service.create_sampling_client(str(folder), quantize=None, dtype="float32")
        (model,) = (loaded.road.model for loaded, _ in engine._bases.values())
        flags = {name: module.training for name, module in model.named_modules()}
        one, two = (client.sample(CHAT, max_tokens=8, seed=1, stop=[]) for _ in range(2))
        assert (one.tokens, one.logprobs) == (two.tokens, two.logprobs)
        assert not any(flags.values())
        assert {name: module.training for name, module in model.named_modules()} == flags


def test_the_same_seed_gives_the_same_completion_alone_and_in_a_batch(sampler):
    alone = [sampler.sample(p, max_tokens=12, seed=9) for p in PROMPTS]
    batch = sampler.sample_batch(PROMPTS, max_tokens=12, seed=9)
    for a, b in zip(alone, batch, strict=True):
        assert a.tokens == b.tokens and np.allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert sampler.sample(CHAT, max_tokens=12, seed=10).tokens != alone[0].tokens


def test_without_a_seed_samples_differ_and_follow_from_the_trainers_seed_and_step(
    service, tiny_model, trainer, sampler
):
    first, second = sampler.sample(CHAT, max_tokens=12), sampler.sample(CHAT, max_tokens=12)
    assert first.tokens != second.tokens
    group = sampler.sample_batch([CHAT], n=4, max_tokens=12)[0]
    assert len({c.tokens for c in group}) == 4
    again = trainer.save_weights_and_get_sampling_client()
    assert again.sample(CHAT, max_tokens=12).tokens == first.tokens


def test_batches_keep_the_order_of_prompts_and_n_decides_the_nesting(sampler):
    flat = sampler.sample_batch(PROMPTS, max_tokens=4)
    assert [type(c) for c in flat] == [Completion] * 4
    groups = sampler.sample_batch(PROMPTS, n=2, max_tokens=4)
    assert [len(g) for g in groups] == [2, 2, 2, 2]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert {c.prompt_tokens for c in group} == {tuple(sampler.prompt_tokens(prompt))}
    assert [len(g) for g in sampler.sample_batch(PROMPTS[:2], n=1, max_tokens=2)] == [1, 1]
    assert sampler.sample_batch([], n=2) == []


def test_a_prompt_gives_exactly_the_ids_that_training_puts_before_the_answer(trainer, sampler):
    for row in ROWS:
        encoded = trainer.renderer.conversation(row["messages"])
        assert sampler.prompt_tokens(row["messages"][:1]) == encoded.tokens[: encoded.prompt_length]


def test_completions_are_text_with_what_made_them(sampler):
    c = sampler.sample(CHAT, max_tokens=8, seed=2)
    assert isinstance(c, str) and c == str(c) and len(c.tokens) == len(c.logprobs) <= 8
    assert c.weights_version == sampler.weights_version and c.stop_reason in ("stop", "length")
    twin = pickle.loads(pickle.dumps(c))
    assert twin == c and twin.id == c.id and twin.tokens == c.tokens and twin.logprobs == c.logprobs
    other = sampler.sample(CHAT, max_tokens=8, seed=2)
    assert other == c and other.id != c.id
    assert (c.temperature, c.top_p, c.top_k, c.min_p, c.filtered) == (1.0, 1.0, None, 0.0, False)
    drawn = pickle.loads(
        pickle.dumps(sampler.sample(CHAT, max_tokens=2, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1))
    )
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p, drawn.filtered) == (0.7, 0.9, 5, 0.1, True)
    assert not sampler.sample(CHAT, max_tokens=2, temperature=0, top_k=5).filtered


def test_streamed_text_adds_up_to_the_completion(sampler):
    stream, whole = sampler.stream(CHAT, max_tokens=20, seed=5), sampler.sample(CHAT, max_tokens=20, seed=5)
    assert stream.completion is None
    assert "".join(stream) == whole == stream.completion
    assert (stream.completion.tokens, stream.completion.stop_reason) == (whole.tokens, whole.stop_reason)
    assert stream.completion.weights_version == sampler.weights_version


def test_a_stream_left_early_leaves_the_engine_usable(sampler):
    expected = sampler.sample(CHAT, max_tokens=8, seed=5)
    stream = sampler.stream(CHAT, max_tokens=50, seed=5)
    next(stream)
    stream.close()
    assert sampler.sample(CHAT, max_tokens=8, seed=5).tokens == expected.tokens


def test_stop_strings_cut_the_text_and_an_empty_list_stops_at_nothing(sampler):
    whole = sampler.sample(CHAT, max_tokens=30, seed=7, stop=[])
    assert whole.stop_reason == "length" and len(whole.tokens) == 30
    mark = whole[5:8]
    cut = sampler.sample(CHAT, max_tokens=30, seed=7, stop=[mark])
    assert cut.stop_reason == "stop" and cut == whole[: whole.index(mark)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and len(cut.logprobs) == len(cut.tokens)


def test_a_string_prompt_warns_once_when_the_adapter_was_trained_on_conversations(service, tiny_model, capsys):
    from local_tinker import ServiceClient

    trainer = ServiceClient(device="cpu").create_lora_training_client(
        str(tiny_model), rank=2, quantize=None, dtype="float32"
    )
    trainer.save_weights_and_get_sampling_client().sample("the", max_tokens=1)
    assert "conversations" not in capsys.readouterr().err
    trainer.forward_backward(ROWS)
    client = trainer.save_weights_and_get_sampling_client()
    client.sample("the", max_tokens=1)
    client.sample("the", max_tokens=1)
    client.sample(CHAT, max_tokens=1)
    assert capsys.readouterr().err.count("trained on conversations and is prompted with a plain string") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": "x"}, "seed"),
        ({"stop": [1.5]}, "stop"),
    ],
)
def test_settings_out_of_range_are_named(sampler, settings, message):
    with pytest.raises(UsageError, match=message):
        sampler.sample(CHAT, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.sample([1.5, 2.5]), "list of float"),
        (lambda s: s.sample([]), ""),
        (lambda s: s.sample_batch("text"), "list of prompts"),
        (lambda s: s.sample_batch(CHAT), "one conversation"),
        (lambda s: s.sample([10**6]), "1000000"),
        (lambda s: s.sample([3] * 256), "256"),
        (lambda s: s.sample_batch([CHAT], n=0), "n must be 1 or more"),
    ],
)
def test_prompts_that_cannot_be_meant_are_named(sampler, call, message):
    with pytest.raises(UsageError, match=message or None):
        call(sampler)


def test_a_closed_client_says_so(sampler):
    sampler.close()
    with pytest.raises(StateError, match="this sampling client was closed"):
        sampler.sample(CHAT)
