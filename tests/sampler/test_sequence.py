import pickle

import pytest

from local_tinker.errors import UsageError
from local_tinker.sampler.group import Sequence
from local_tinker.sampler.grouping import build_groups
from local_tinker.sampler.sequence import Request, SamplingParams, derive_seed
from local_tinker.sampler.stop import StopRules
from tests.sampler.toy import byte_tokenizer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5"),
        ({"max_tokens": True}, "max_tokens must be a whole number, got True"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_k": -2}, "top_k must be 1 or more"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
        ({"stop": [2.0]}, "stop takes strings and token ids, got 2.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name_and_value(changes, said):
    with pytest.raises(UsageError, match=said):
        SamplingParams(**changes)


def test_the_defaults_are_512_tokens_of_the_plain_distribution():
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (
        512,
        1.0,
        1.0,
        None,
        0.0,
    )
    assert params.seed is None and params.stop is None and not params.filtered


def test_every_spelling_of_no_top_k_is_off():
    assert {SamplingParams(top_k=off) for off in (None, 0, -1)} == {SamplingParams()}


def test_filters_count_only_above_temperature_zero():
    assert SamplingParams(top_p=0.9).filtered
    assert not SamplingParams(top_p=0.9, temperature=0).filtered


def test_a_request_takes_its_seed_from_the_settings_or_draws_one():
    assert Request((1,), SamplingParams(seed=5)).seed == 5
    assert Request((1,), SamplingParams(seed=5), seed=6).seed == 6
    assert Request((1,)).seed != Request((1,)).seed


@pytest.mark.parametrize(("prompt", "n", "said"), [((), 1, "no tokens"), ((3, -1), 1, "-1"), ((3,), 0, "got 0")])
def test_a_request_without_meaning_is_refused(prompt, n, said):
    with pytest.raises(UsageError, match=said):
        Request(prompt, n=n)


def groups_of(requests, **changes):
    settings = {
        "max_positions": 10,
        "vocab_size": 300,
        "tokenizer": None,
        "stream": False,
        "skip_special_tokens": False,
    }
    return build_groups(requests, **{**settings, **changes})


def test_equal_prompts_share_one_group_and_every_sample_has_a_seed_of_its_own():
    groups = groups_of([Request((1, 2), seed=7, n=2), Request((3,), seed=7), Request((1, 2), seed=8)])
    assert [group.prompt_tokens for group in groups] == [(1, 2), (3,)]
    assert [(s.request, s.sample, s.seed) for s in groups[0].waiting] == [
        (0, 0, derive_seed(7, 0)),
        (0, 1, derive_seed(7, 1)),
        (2, 0, derive_seed(8, 0)),
    ]
    assert groups[0].unfinished == 3


def test_new_tokens_end_with_the_context():
    (group,) = groups_of([Request((1,) * 7, SamplingParams(max_tokens=50))])
    assert group.waiting[0].max_new == 3


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request((1,) * 10), "10 tokens and the model's context is 10"),
        (Request((300,)), "token id 300, the model has 300"),
        (Request((1,), stop_rules=StopRules(stop_strings=("x",))), "need the tokenizer"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_before_anything_runs(request_, said):
    with pytest.raises(UsageError, match=said):
        groups_of([request_])


def sequence(tokenizer, rules, *, max_new=9, stream=False):
    (group,) = groups_of(
        [Request((65,), SamplingParams(max_tokens=max_new), rules)], tokenizer=tokenizer, stream=stream
    )
    return group.waiting[0]


def fill(row: Sequence, text):
    deltas = [row.push(token, -0.5) for token in text]
    return deltas, row.result()


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_token_is_counted_and_not_shown(stream):
    tokenizer = byte_tokenizer()
    eos = tokenizer.convert_tokens_to_ids("<eos>")
    deltas, result = fill(sequence(tokenizer, StopRules(frozenset({eos})), stream=stream), [*b"hi", eos])
    assert (result.tokens, result.text, result.stop_reason) == ((104, 105, eos), "hi", "stop")
    assert result.logprobs == (-0.5,) * 3
    assert "".join(d.text for d in deltas) == ("hi" if stream else "")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unfinished_character_at_the_length_limit_is_in_the_text(stream):
    deltas, result = fill(sequence(byte_tokenizer(), StopRules(), max_new=3, stream=stream), b"a\xe4\xbd")
    assert (result.text, result.stop_reason) == ("a\ufffd", "length")
    if stream:
        assert [d.text for d in deltas] == ["a", "", "\ufffd"]


def test_a_stop_token_at_the_length_limit_is_a_stop():
    assert fill(sequence(None, StopRules(frozenset({7})), max_new=2), [1, 7])[1].stop_reason == "stop"


@pytest.mark.parametrize(
    ("rules", "tokens", "text"),
    [
        (StopRules(frozenset({7})), [1, 2, 7, 3], None),
        (StopRules(stop_strings=("lo",)), [*b"hello world"], "hel"),
        (StopRules(), [1, 2, 3, 4, 5], None),
    ],
)
def test_of_a_block_of_steps_the_tokens_up_to_the_stop_are_taken(rules, tokens, text):
    row = sequence(byte_tokenizer() if text else None, rules, max_new=5 if text else 3)
    assert row.extend(tokens, [-float(i) for i in range(len(tokens))]) == []
    result, count = row.result(), 5 if text else 3
    assert (result.tokens, result.text) == (tuple(tokens[:count]), text)
    assert result.logprobs == tuple(-float(i) for i in range(count))


def test_blocks_without_a_stop_id_are_taken_whole_and_nothing_after_the_end():
    row = sequence(None, StopRules(frozenset({7})), max_new=8)
    for tokens in ([1, 2, 3], [4, 7, 5], [6, 6, 6]):
        assert row.extend(tokens, [-1.0] * 3) == []
    assert (row.tokens, row.stop_reason) == ([1, 2, 3, 4, 7], "stop")


def test_a_finished_sample_makes_a_completion_that_pickles():
    _, result = fill(sequence(byte_tokenizer(), StopRules(stop_strings=("lo",))), b"hello")
    completion = pickle.loads(pickle.dumps(result.completion(weights_version="v/3")))
    assert completion == "hel"
    assert completion.tokens == tuple(b"hello") and completion.prompt_tokens == (65,)
    assert completion.weights_version == "v/3" and completion.stop_reason == "stop"
