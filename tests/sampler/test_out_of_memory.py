"""Running out of memory while sampling: the run goes on with less and gives what it would have given."""

import pytest
import torch

from local_tinker import ServiceClient
from local_tinker.engine.local import LocalEngine
from local_tinker.errors import DeviceMemoryError
from local_tinker.sampler.forward import Forward
from local_tinker.sampler.kv_cache import KVCache
from local_tinker.sampler.run import Run
from local_tinker.sampler.running import Size
from local_tinker.sampler.workspace import Workspace, record
from tests.engine.test_out_of_memory import fail
from tests.sampler.test_decode import PLAIN, flat, requests, same
from tests.sampler.toy import ToyRoad, byte_tokenizer, engine
from tests.test_sampling import CHAT, PROMPTS
from tests.test_training import ROWS, inner, warm

SITES = {
    "prompts": (Forward, "context"),
    "decoding": (Forward, "step"),
    "logits": (Forward, "logits"),
    "storage": (KVCache, "grow"),
    "first draws": (Run, "_first_draw"),
    "rows": (Workspace, "__init__"),
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("times", [1, 3])
def test_a_run_that_runs_out_goes_on_with_less_and_gives_the_same(monkeypatch, site, times):
    road, asked, said = ToyRoad(), requests(10, n=2), []
    expected = flat(engine(road).collect(asked, **PLAIN))
    sampler = engine(road)
    with monkeypatch.context() as patch:
        visits = fail(patch, SITES[site], times)
        found = sorted(sampler.run(asked, say=said.append, **PLAIN), key=lambda f: (f.request, f.sample))
    same(found, expected)
    assert len(visits) > times and len(said) == times
    assert said[0].startswith("out of memory while sampling; the work is repeated, 8 at a time with a cache of ")
    same(flat(sampler.collect(asked, **PLAIN)), expected)


def test_tokens_that_were_given_out_are_not_given_again(monkeypatch):
    road, tokenizer = ToyRoad(vocab=258), byte_tokenizer()
    asked, steps = requests(6, n=2), []
    expected = engine(road).collect(asked, **PLAIN)
    real = Forward.step

    def step(self, *args):
        steps.append(1)
        if len(steps) in (4, 9):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args)

    monkeypatch.setattr(Forward, "step", step)
    streamed, ended = {}, {}
    for event in engine(road).run(asked, stream=True, tokenizer=tokenizer, **PLAIN):
        key = event.request, event.sample
        if hasattr(event, "stop_reason"):
            ended[key] = event
        else:
            streamed[key] = streamed.get(key, ()) + event.tokens
    assert streamed == {key: finished.tokens for key, finished in ended.items()}
    assert [[ended[i, s].tokens for s in range(2)] for i in range(6)] == [[f.tokens for f in g] for g in expected]


def test_when_one_row_alone_does_not_fit_a_typed_error_says_so_and_the_engine_stays_usable(monkeypatch):
    road, asked, said = ToyRoad(), requests(6, n=2), []
    sampler = engine(road)
    with monkeypatch.context() as patch:
        fail(patch, SITES["decoding"], 10**6)
        with pytest.raises(DeviceMemoryError, match=r"out of memory \(CUDA out of memory\).*max_tokens") as caught:
            list(sampler.run(asked, say=said.append, **PLAIN))
    assert caught.value.exit_code == 4 and caught.value.__context__ is None
    assert 3 < len(said) < 12 and " 1 at a time" in said[-1] and sampler.kept_bytes == 0
    same(flat(sampler.collect(asked, **PLAIN)), flat(engine(road).collect(asked, **PLAIN)))


def test_other_errors_are_not_repeated(monkeypatch):
    visits = fail(monkeypatch, SITES["decoding"], 1, error=RuntimeError("an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        engine(ToyRoad()).collect(requests(3), **PLAIN)
    assert len(visits) == 1


def test_scoring_runs_out_and_is_repeated_in_smaller_pieces(monkeypatch):
    road, tokens = ToyRoad(), requests(5)[4].prompt_tokens * 2
    expected = engine(road).prompt_logprobs(tokens, **PLAIN)
    with monkeypatch.context() as patch:
        fail(patch, SITES["prompts"], 3)
        assert engine(road).prompt_logprobs(tokens, **PLAIN)[1:] == pytest.approx(expected[1:], abs=1e-5)
        fail(patch, SITES["prompts"], 10**6)
        with pytest.raises(DeviceMemoryError):
            engine(road).prompt_logprobs(tokens, **PLAIN)
    assert engine(road).prompt_logprobs(tokens, **PLAIN) == expected


def test_sizes_halve_down_to_what_one_row_needs():
    sizes = [Size(6, 10, 200)]
    while (smaller := sizes[-1].smaller(least_rows=1, least_pages=4)) is not None:
        sizes.append(smaller)
    assert [(s.rows, s.pages, s.chunk) for s in sizes] == [(6, 10, 200), (3, 5, 100), (1, 4, 64)]
    assert Size(64, 4, 64).smaller(least_rows=64, least_pages=4) is None


@pytest.fixture
def trainer(tiny_model):
    with ServiceClient(engine=LocalEngine("cpu"), quiet=True) as service:
        trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=None, dtype="float32", seed=1)
        warm(trainer)
        yield trainer


def test_training_drops_the_samplers_idle_cache_before_it_changes_its_plan(trainer, monkeypatch):
    from local_tinker.engine import step

    sampler = trainer.save_weights_and_get_sampling_client()
    expected = sampler.sample_batch(PROMPTS, max_tokens=6, seed=1)
    (kept,) = trainer._engine._samplers.values()
    plan, said = inner(trainer).budget, []
    inner(trainer)._say = said.append
    assert kept.kept_bytes > 0
    with monkeypatch.context() as patch:
        fail(patch, (step, "target_logprobs"), 1)
        trainer.forward_backward(ROWS)
    assert kept.kept_bytes == 0 and inner(trainer).budget is plan
    assert said == ["out of memory; the sampler's idle cache was let go and the call is repeated"]
    with monkeypatch.context() as patch:
        fail(patch, (step, "target_logprobs"), 1)
        trainer.forward_backward(ROWS)
    assert inner(trainer).budget.total < plan.total and len(said) == 2
    again = sampler.sample_batch(PROMPTS, max_tokens=6, seed=1)
    assert [c.tokens for c in again] == [c.tokens for c in expected]


def test_a_client_says_it_once_and_gives_the_same(trainer, monkeypatch):
    sampler, said = trainer.save_weights_and_get_sampling_client(), []
    expected = sampler.sample_batch([CHAT], n=4, max_tokens=6, seed=1)
    sampler._say._write = said.append
    for _ in range(2):
        trainer._engine._spare()
        with monkeypatch.context() as patch:
            fail(patch, SITES["decoding"], 1)
            assert [c.tokens for c in sampler.sample_batch([CHAT], n=4, max_tokens=6, seed=1)[0]] == [
                c.tokens for c in expected[0]
            ]
    assert len(said) == 1 and said[0].startswith("out of memory while sampling")


@pytest.mark.parametrize("ends_badly", [True, False])
def test_a_step_that_fails_while_it_is_recorded_raises_its_own_error(ends_badly, monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *a, name=name: told.append((name, *a)), raising=False)

    class Graph:
        ended = 0

        def capture_begin(self, **_):
            pass

        def capture_end(self):
            self.ended += 1
            if ends_badly:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    graph = Graph()
    with pytest.raises(torch.OutOfMemoryError):
        record(graph, step, pool=(0, 1))
    assert graph.ended == 1
    over = [("_cuda_endAllocateToPool", 3, (0, 1)), ("_cuda_releasePool", 3, (0, 1))]
    assert told == over * ends_badly
    if ends_badly:  # of a step that went well it is an error
        with pytest.raises(RuntimeError, match="during capture"):
            record(graph, lambda: None, pool=(0, 1))
        assert told == over * 2
