import gc
import random
from dataclasses import replace

import numpy
import pytest
import torch

from local_tinker.errors import ModelError, UsageError
from local_tinker.sampler.decode import Progress
from local_tinker.sampler.group import PAGE
from local_tinker.sampler.scheduler import Scheduler
from local_tinker.sampler.sequence import Delta, Finished, Request, SamplingParams
from local_tinker.sampler.stop import StopRules
from tests.sampler.toy import VOCAB, ToyRoad, byte_tokenizer, engine, full_logits, full_logprobs

PLAIN = {"pairs": {}, "scale": 1.0}
MIXED = [
    {},
    {"temperature": 0},
    {"temperature": 0.7, "max_tokens": 3},
    {"top_k": 5, "max_tokens": 40},
    {"top_p": 0.7, "temperature": 1.4},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "max_tokens": 1},
    {"max_tokens": 75},
]


def prompt(length, seed):
    generator = random.Random(seed)
    return tuple(generator.randrange(VOCAB) for _ in range(length))


def requests(count, *, n=1, stop_ids=(), lengths=(3, 40, 1, 17, 90, 16)):
    return [
        Request(
            prompt(lengths[i % len(lengths)], i),
            SamplingParams(**{"max_tokens": 12, **MIXED[i % len(MIXED)]}),
            StopRules(frozenset(stop_ids)),
            seed=100 + i,
            n=n,
        )
        for i in range(count)
    ]


def same(one, other):
    assert [f.tokens for f in one] == [f.tokens for f in other]
    assert [f.stop_reason for f in one] == [f.stop_reason for f in other]
    for a, b in zip(one, other, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def flat(results):
    return [finished for group in results for finished in group]


def singly(road, asked, **changes):
    return flat([engine(road, **changes).collect([one], **PLAIN)[0] for one in asked])


@pytest.mark.parametrize("kind", [{}, {"window": 7}, {"softcap": 5.0}, {"window": 20, "softcap": 3.0}])
def test_log_probs_are_those_of_a_full_forward_at_every_setting(kind):
    road = ToyRoad(**kind)
    for (finished,) in engine(road).collect(requests(8), **PLAIN):
        assert len(finished.tokens) == len(finished.logprobs)
        truth = full_logprobs(road, finished.prompt_tokens, finished.tokens)
        assert finished.logprobs == pytest.approx(truth, abs=1e-5)


def test_temperature_zero_is_the_argmax_of_a_full_forward_token_by_token():
    road = ToyRoad()
    request = Request(prompt(9, 1), SamplingParams(temperature=0, max_tokens=20))
    ((finished,),) = engine(road).collect([request], **PLAIN)
    logits = full_logits(road, [*request.prompt_tokens, *finished.tokens])[8:-1]
    assert list(finished.tokens) == logits.argmax(-1).tolist()
    assert finished.stop_reason == "length"


def test_a_seed_gives_the_same_completion_alone_and_in_a_batch_of_eight():
    road = ToyRoad()
    asked = requests(8)
    same(flat(engine(road).collect(asked, **PLAIN)), singly(road, asked))


def test_ten_requests_through_three_rows_equal_one_by_one():
    road = ToyRoad()
    asked = requests(10, n=2, stop_ids=(4, 9))
    results = engine(road, max_rows=3).collect(asked, **PLAIN)
    assert [len(group) for group in results] == [2] * 10
    assert {f.stop_reason for f in flat(results)} == {"stop", "length"}
    same(flat(results), singly(road, asked))


def test_a_full_cache_evicts_rows_computes_them_again_and_loses_nothing(monkeypatch):
    road = ToyRoad()
    asked = requests(10, n=3)
    asked[3] = replace(asked[3], params=SamplingParams(max_tokens=150, top_k=5))
    evicted, evict = [], Scheduler.evict
    monkeypatch.setattr(Scheduler, "evict", lambda self: evicted.append(evict(self)))
    tight = engine(road, token_budget=PAGE * 7, max_rows=6)  # three samples of the largest need one page more
    same(flat(tight.collect(asked, **PLAIN)), flat(engine(road).collect(asked, **PLAIN)))
    assert evicted


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", [{}, {"window": 7, "softcap": 5.0}])
def test_prompts_cut_into_pieces_equal_whole_ones(chunk, kind):
    road = ToyRoad(**kind)
    asked = requests(6)
    same(flat(engine(road, prefill_chunk=chunk).collect(asked, **PLAIN)), flat(engine(road).collect(asked, **PLAIN)))


def test_the_samples_of_a_prompt_differ_and_each_repeats():
    road = ToyRoad()
    request = Request(prompt(5, 3), SamplingParams(max_tokens=10), seed=1, n=4)
    (first,), (second,) = (engine(road).collect([request], **PLAIN) for _ in range(2))
    assert len({f.tokens for f in first}) == 4
    assert [f.tokens for f in first] == [f.tokens for f in second]
    (more,) = engine(road).collect([Request(request.prompt_tokens, request.params, seed=1, n=6)], **PLAIN)
    same(more[:4], first)


def test_equal_prompts_are_computed_once():
    road = ToyRoad()
    request = Request(prompt(50, 3), SamplingParams(max_tokens=2), seed=1, n=4)
    engine(road).collect([request, Request(request.prompt_tokens, request.params, seed=2)], **PLAIN)
    assert road.tokens_seen == 50 + 5
    assert road.forwards == 2


def test_a_common_beginning_of_lone_prompts_is_computed_once_and_changes_nothing():
    road = ToyRoad(window=50)
    beginning = prompt(100, 1)
    asked = [
        Request(beginning + prompt(length, 10 + length), SamplingParams(max_tokens=6), seed=length)
        for length in (0, 1, 9, 30)
    ] + requests(2)
    together = flat(engine(road).collect(asked, **PLAIN))
    first = 99 + (1 + 2 + 10 + 31)  # the shortest keeps its last token for itself
    assert road.tokens_seen == first + sum(len(r.prompt_tokens) for r in asked[4:]) + sum(
        len(f.tokens) - 1 for f in together
    )
    same(together, singly(road, asked))
    assert [f.prompt_tokens for f in together] == [r.prompt_tokens for r in asked]


def test_a_beginning_that_prompts_with_several_samples_share_is_computed_once_and_changes_nothing():
    road = ToyRoad(window=90)
    system, header = prompt(150, 1), prompt(80, 2)  # two whole pages and one
    prompts = [system + prompt(length, 10 + length) for length in (3, 20, 70)]
    prompts += [system + header + prompt(length, 20 + length) for length in (1, 9)]
    asked = [Request(p, SamplingParams(max_tokens=6), seed=i, n=3) for i, p in enumerate(prompts)]
    asked += [Request(system + prompt(5, 77), SamplingParams(max_tokens=6), seed=9), *requests(2)]
    together = flat(engine(road, max_rows=30).collect(asked, **PLAIN))
    steps = max(len(f.tokens) for f in together) - 1
    alone = [r.prompt_tokens for r in asked[6:]]
    once = 2 * PAGE + (150 + 80) // PAGE * PAGE - 2 * PAGE
    rest = sum(len(p) - 2 * PAGE for p in [*prompts[:3], asked[5].prompt_tokens])
    rest += sum(len(p) - (150 + 80) // PAGE * PAGE for p in prompts[3:])
    decoded = sum(len(f.tokens) - 1 for f in together)
    assert steps > 0 and road.tokens_seen == once + rest + sum(map(len, alone)) + decoded
    same(together, singly(road, asked))


@pytest.mark.parametrize("pages", [9, 14])
def test_a_shared_beginning_survives_a_full_cache(pages):
    road = ToyRoad(window=90)
    system = prompt(150, 1)
    asked = [Request(system + prompt(9, 10 + i), SamplingParams(max_tokens=80), seed=i, n=2) for i in range(4)]
    small = engine(road, max_rows=6, token_budget=pages * PAGE)
    same(flat(small.collect(asked, **PLAIN)), singly(road, asked))


def test_a_long_run_crosses_pages():
    road = ToyRoad(window=30)
    asked = [Request(prompt(3 + i, i), SamplingParams(max_tokens=160 - 40 * i), seed=i) for i in range(3)]
    results = flat(engine(road).collect(asked, **PLAIN))
    assert [len(f.tokens) for f in results] == [160, 120, 80]
    for finished in results:
        truth = full_logprobs(road, finished.prompt_tokens, finished.tokens)
        assert finished.logprobs == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_rows_decode_once_all_contexts_are_computed_or_at_once_where_text_is_awaited(stream):
    asked = [Request(prompt(40, i), SamplingParams(max_tokens=5), seed=i) for i in range(4)]
    sampler = engine(ToyRoad(), prefill_chunk=40)  # a prompt a forward
    step, sizes = sampler.forward.step, []

    def counted(state, *rest):
        sizes.append(state.token.shape[0])
        return step(state, *rest)

    sampler.forward.step = counted
    done = [
        event
        for event in sampler.run(asked, **PLAIN, tokenizer=byte_tokenizer(), stream=stream)
        if isinstance(event, Finished)
    ]
    assert [len(finished.tokens) for finished in done] == [5] * 4
    # the first token of a row comes with its context
    assert sizes == ([1, 2, 3, 4, 3, 2, 1] if stream else [4] * 4)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}])
def test_what_a_run_launches_is_compiled_once_and_first_without_changing_a_draw(settings, monkeypatch):
    asked = [Request(prompt(20, i), SamplingParams(max_tokens=5, **settings), seed=i) for i in range(3)]
    expected = flat(engine(ToyRoad()).collect(asked, **PLAIN))
    gathered = []
    monkeypatch.setattr("local_tinker.sampler.forward.compile_first", lambda step, device: gathered.append(step()))
    sampler = engine(ToyRoad())
    for _ in range(2):
        same(flat(sampler.collect(asked, **PLAIN)), expected)
    assert len(gathered) == 2  # contexts and first draws; steps are recorded on a card alone


def test_one_token_needs_no_decode_step():
    road = ToyRoad()
    ((finished,),) = engine(road, token_budget=PAGE).collect(
        [Request(prompt(PAGE, 1), SamplingParams(max_tokens=1))], **PLAIN
    )
    assert len(finished.tokens) == 1 and finished.stop_reason == "length"
    assert road.forwards == 1


def test_the_context_ends_a_completion_and_its_last_token_still_fits():
    road = ToyRoad()
    ((finished,),) = engine(road, max_positions=20).collect([Request(prompt(15, 1), SamplingParams())], **PLAIN)
    assert len(finished.tokens) == 5 and finished.stop_reason == "length"


def test_a_prompt_that_fills_the_context_is_refused_at_the_call_not_at_the_first_event():
    with pytest.raises(UsageError, match="20 tokens and the model's context is 20"):
        engine(ToyRoad(), max_positions=20).run([Request(prompt(20, 1))], **PLAIN)


def test_no_requests_give_no_events():
    assert engine(ToyRoad()).collect([], **PLAIN) == []


def test_an_adapter_on_layers_and_head_is_applied_to_prompts_and_new_tokens():
    road = ToyRoad()
    generator = torch.Generator().manual_seed(9)
    pairs = {
        "layers.0.q": (torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)),
        "lm_head": (torch.randn(2, 32, generator=generator), torch.randn(VOCAB, 2, generator=generator)),
    }
    asked = requests(4)
    plain = flat(engine(road).collect(asked, **PLAIN))
    adapted = flat(engine(road).collect(asked, pairs=pairs, scale=0.2))
    assert [f.tokens for f in plain] != [f.tokens for f in adapted]
    for finished in adapted:
        truth = full_logprobs(road, finished.prompt_tokens, finished.tokens, pairs=pairs, scale=0.2)
        assert finished.logprobs == pytest.approx(truth, abs=1e-5)


def test_nothing_of_one_run_is_reused_by_the_next_with_other_weights():
    road, other = ToyRoad(), ToyRoad(seed=1)
    sampler = engine(road)
    asked = requests(4)
    sampler.collect(asked, **PLAIN)
    road.layers, road.embedding, road.head.weight = other.layers, other.embedding, other.head.weight
    same(flat(sampler.collect(asked, **PLAIN)), flat(engine(other).collect(asked, **PLAIN)))


@pytest.mark.parametrize("how", ["close", "abandon", "interrupt"])
def test_an_interrupted_run_leaves_the_engine_usable(how):
    road = ToyRoad()
    sampler = engine(road, max_rows=3)
    asked = requests(10)
    events = sampler.run(asked, **PLAIN)
    next(events)
    if how == "close":
        events.close()
    elif how == "abandon":
        del events
    else:
        original, road.hidden = road.hidden, _interrupt
        with pytest.raises(KeyboardInterrupt):
            list(events)
        road.hidden = original
    same(flat(sampler.collect(asked, **PLAIN)), singly(road, asked))


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_storage_is_kept_between_runs_only_where_there_is_room_for_it():
    for room, kept in ((0, 0), (2**30, 1)):
        sampler = engine(ToyRoad())
        sampler.keep_bytes = room
        events = sampler.run(requests(3), **PLAIN)
        next(events)
        assert sampler.kept_bytes == 0
        events.close()
        assert (sampler.kept_bytes > 0) == kept
        sampler.free()
        assert sampler.kept_bytes == 0


def test_memory_stays_flat_over_two_hundred_runs_with_changing_adapters():
    road = ToyRoad()
    sampler = engine(road)
    sampler.keep_bytes = 2**30
    seen = []
    for step in range(200):
        pair = torch.full((2, 32), 0.01 * step), torch.full((32, 2), 0.01)
        asked = [Request(prompt(5 + i, i), SamplingParams(max_tokens=2), seed=i, n=2) for i in range(step % 2 + 1)]
        sampler.collect(asked, pairs={"layers.0.q": pair}, scale=0.2)
        if step % 20 == 19:
            gc.collect()
            seen.append((sampler.kept_bytes, sum(torch.is_tensor(o) for o in gc.get_objects())))
    assert len(set(seen[1:])) == 1


def test_two_open_runs_do_not_disturb_each_other():
    road = ToyRoad()
    sampler, asked = engine(road), requests(6)
    one, two = sampler.run(asked[:3], stream=True, tokenizer=byte_tokenizer(), **PLAIN), sampler.run(asked[3:], **PLAIN)
    taken = {0: [], 1: []}
    for first in one:
        taken[0].append(first)
        taken[1] += [event for _, event in zip(range(1), two, strict=False)]
    taken[1] += list(two)
    ended = [sorted((e for e in t if isinstance(e, Finished)), key=lambda f: f.request) for t in taken.values()]
    same([*ended[0], *ended[1]], singly(road, asked))


def test_no_global_generator_moves():
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    engine(ToyRoad()).collect([Request(prompt(4, 1), SamplingParams(max_tokens=5, top_p=0.9), n=3)], **PLAIN)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and numpy.random.get_state()[1].tolist() == before[2]


def test_the_road_runs_without_gradients_and_the_callers_mode_is_its_own_between_events():
    road = ToyRoad()
    road.embedding.requires_grad_()
    for _ in engine(road).run(requests(3), **PLAIN):
        assert torch.is_grad_enabled()
    # not inference mode: tensors a road keeps from here must be usable in training later
    assert road.grad_modes == {(False, False)}


def test_streamed_pieces_join_to_the_finished_sample():
    tokenizer = byte_tokenizer()
    road = ToyRoad(vocab=len(tokenizer))
    asked = [
        Request(prompt(4, i), SamplingParams(max_tokens=60), StopRules(frozenset({9}), ("A", "qz")), seed=i, n=2)
        for i in range(3)
    ]
    deltas, finished = {}, {}
    for event in engine(road).run(asked, tokenizer=tokenizer, stream=True, **PLAIN):
        key = event.request, event.sample
        if isinstance(event, Delta):
            assert key not in finished
            deltas.setdefault(key, []).append(event)
        else:
            finished[key] = event
    assert sorted(finished) == [(i, s) for i in range(3) for s in range(2)]
    for key, whole in finished.items():
        assert tuple(t for d in deltas[key] for t in d.tokens) == whole.tokens
        assert tuple(v for d in deltas[key] for v in d.logprobs) == whole.logprobs
        assert "".join(d.text for d in deltas[key]) == whole.text
    quiet = flat(engine(road).collect(asked, tokenizer=tokenizer, **PLAIN))
    assert [f.text for f in quiet] == [finished[f.request, f.sample].text for f in quiet]


def test_a_stop_string_ends_a_row_and_leaves_its_neighbours_running():
    tokenizer = byte_tokenizer()
    road = ToyRoad(vocab=len(tokenizer))
    free = Request(prompt(4, 1), SamplingParams(max_tokens=30), seed=1)
    ((whole,),) = engine(road).collect([free], tokenizer=tokenizer, **PLAIN)
    at = next(i for i in range(3, 30) if 32 < whole.tokens[i] < 127 and whole.tokens[i] not in whole.tokens[:i])
    stopping = Request(free.prompt_tokens, free.params, StopRules(stop_strings=(chr(whole.tokens[at]),)), seed=1)
    (cut,), (rest,) = engine(road).collect([stopping, free], tokenizer=tokenizer, **PLAIN)
    assert cut.tokens == whole.tokens[: at + 1] and len(cut.logprobs) == at + 1
    assert cut.text == whole.text[: whole.text.index(chr(whole.tokens[at]))]
    assert cut.stop_reason == "stop"
    assert (rest.tokens, rest.text) == (whole.tokens, whole.text)


@pytest.mark.parametrize("chunk", [1, 8, 500])
def test_prompt_log_probs_are_none_first_then_those_of_a_full_forward(chunk, monkeypatch):
    monkeypatch.setattr("local_tinker.sampler.decode.HEAD_ROWS", 5)
    road = ToyRoad(window=9)
    tokens = prompt(33, 4)
    scores = engine(road, prefill_chunk=chunk).prompt_logprobs(tokens, **PLAIN)
    assert scores[0] is None
    assert scores[1:] == pytest.approx(full_logprobs(road, tokens[:1], tokens[1:]), abs=1e-5)
    assert engine(road).prompt_logprobs([7], **PLAIN) == [None]


@pytest.mark.parametrize(
    ("tokens", "changes", "said"),
    [
        (prompt(21, 1), {"max_positions": 20}, "context is 20"),
        (prompt(70, 1), {"token_budget": 64}, "budget is 64"),
        ((VOCAB,), {}, f"token id {VOCAB}"),
        ((), {}, "no tokens"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(tokens, changes, said):
    with pytest.raises(UsageError, match=said):
        engine(ToyRoad(), **changes).prompt_logprobs(tokens, **PLAIN)


def test_logits_that_are_not_finite_are_an_error_not_a_log_prob():
    road = ToyRoad()
    road.head.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        engine(road).collect(requests(1), **PLAIN)


def test_progress_counts_samples_and_tokens_to_the_end():
    seen = []
    engine(ToyRoad()).collect(requests(5, n=2), progress=seen.append, **PLAIN)
    assert all(a.finished <= b.finished and a.tokens <= b.tokens for a, b in zip(seen, seen[1:], strict=False))
    lengths = [MIXED[i].get("max_tokens", 12) for i in range(5)]
    assert seen[-1] == Progress(finished=10, total=10, tokens=2 * sum(lengths))


def test_double_precision_stays_double_through_the_cache():
    road = ToyRoad(dtype=torch.float64)
    finished = flat(engine(road).collect(requests(2), **PLAIN))[0]
    truth = full_logprobs(road, finished.prompt_tokens, finished.tokens)
    assert finished.logprobs == pytest.approx(truth, abs=1e-6)  # the log-softmax itself is fp32
