"""Running out of memory anywhere in a call: state as before it, then the same call by a smaller plan, to the bit."""

import weakref

import pytest
import torch

from local_tinker import out_of_memory
from local_tinker.cli import app
from local_tinker.engine import local, optimiser, step
from local_tinker.engine import trainer as module
from local_tinker.engine.footprint import total_bytes
from local_tinker.errors import DeviceMemoryError
from local_tinker.model.layer import DecoderPass
from local_tinker.out_of_memory import is_out_of_memory, until_it_fits
from tests.test_training import ROWS, everything, inner, same, warm

# (owner, attribute): the places where a call allocates
PASS_SITES = {
    "tokens to the device": (module, "micro_batch"),
    "hidden states": (step, "_hidden"),
    "head": (step, "target_logprobs"),
    "loss": (module, "loss_terms"),
    "bookkeeping": (module, "record"),
    "gradient buffer": (optimiser.GradientWindow, "buffer"),
    "backup": (optimiser.GradientWindow, "backup"),
    "backward": (DecoderPass, "_layer_backward"),
}
STEP_SITES = {
    "norm": (optimiser.GradientWindow, "norm"),
    "clipping": (module, "clip"),
    "slices": (optimiser.FlatAdamW, "prepare"),
}


@pytest.fixture
def client(service, tiny_model):
    def make(**options):
        trainer = service.create_lora_training_client(
            str(tiny_model), rank=4, alpha=8, quantize=None, dtype="float32", seed=1, **options
        )
        warm(trainer)
        return trainer

    return make


def fail(monkeypatch, site, times, *, before=lambda: None, error=None):
    """Let a place run out of memory on its first visits; returns the list of visits."""
    owner, name = site
    real, visits = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        before()
        visits.append(name)
        if len(visits) <= times:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return visits


def pending(client):
    """A trainer in mid-window, with several micro-batches to a call, and what it says."""
    trainer = client(micro_batch_tokens=64)
    inner(trainer)._spare()  # what samplers of earlier tests left idle would be let go of first
    trainer.forward_backward(ROWS)
    trainer.optim_step()
    trainer.forward_backward(ROWS[:2])
    return trainer


def attempts_of(patch, trainer):
    """The trainer's state after each failed attempt, as the calls go on. Collecting garbage is left out: it takes time."""
    states = []
    patch.setattr(out_of_memory, "give_back", lambda: states.append(everything(trainer)))
    return states


@pytest.mark.parametrize("site", PASS_SITES)
def test_a_pass_that_runs_out_is_repeated_as_if_it_had_been_run_so_from_the_start(client, monkeypatch, site):
    trainer = pending(client)
    state, plan, before = inner(trainer), inner(trainer).budget, everything(trainer)
    start, calls = state.window.backup(), state.calls
    for times in (1, 2, 3, 4, 5):
        with monkeypatch.context() as patch:
            states = attempts_of(patch, trainer)
            visits = fail(patch, PASS_SITES[site], times)
            result = trainer.forward_backward(ROWS)
        assert len(visits) > times and len(states) == times and all(same(before, s) for s in states)
        found, after = state.budget, everything(trainer)
        assert total_bytes(found.dims, found.settings, found.choice) < total_bytes(
            plan.dims, plan.settings, plan.choice
        )
        state.window.restore(start)
        state.calls = calls
        assert same(before, everything(trainer))
        expected = trainer.forward_backward(ROWS)
        assert state.budget is found and same(after, everything(trainer))
        assert float(result) == float(expected) and result.metrics == expected.metrics
        assert all((a == b).all() for a, b in zip(result.logprobs, expected.logprobs, strict=True))
        state.window.restore(start)
        state.calls, state.budget = calls, plan


@pytest.mark.parametrize("site", STEP_SITES)
def test_an_optimiser_step_that_runs_out_changes_nothing_and_is_repeated(client, monkeypatch, site):
    trainer, clean = pending(client), pending(client)
    for times in (1, 2, 3, 4, 5):
        before = everything(trainer)
        with monkeypatch.context() as patch:
            states = attempts_of(patch, trainer)
            fail(patch, STEP_SITES[site], times)
            stepped = trainer.optim_step(learning_rate=1e-2)
        assert len(states) == times and all(same(before, s) for s in states)
        expected = clean.optim_step(learning_rate=1e-2)
        assert (
            (stepped.step, stepped.grad_norm) == (expected.step, expected.grad_norm) == (1 + times, stepped.grad_norm)
        )
        assert same(everything(clean), everything(trainer))
        inner(trainer).budget = inner(clean).budget
        for one in (trainer, clean):
            one.forward_backward(ROWS[:3])


def test_scoring_and_forward_run_out_and_are_repeated(client, monkeypatch):
    trainer = pending(client)
    before, expected = everything(trainer), trainer.forward(ROWS)
    units = [(d,) for d in trainer._prepared(ROWS, "sft").units[0]]
    scored = inner(trainer).score(units, values=False, reference=True)
    with monkeypatch.context() as patch:
        fail(patch, PASS_SITES["hidden states"], 2)
        assert float(trainer.forward(ROWS)) == pytest.approx(float(expected), rel=1e-6)
    with monkeypatch.context() as patch:
        fail(patch, PASS_SITES["head"], 2)
        again = inner(trainer).score(units, values=False, reference=True)
    assert all((a == b).all() for a, b in zip(scored.logprobs, again.logprobs, strict=True))
    assert same(before, everything(trainer))


def test_a_first_call_with_a_value_head_runs_out_and_leaves_none(client, monkeypatch):
    trainer = client(micro_batch_tokens=64)
    state, units = inner(trainer), trainer._prepared(ROWS, "sft").units
    call = module.LossCall(units, "sft")
    monkeypatch.setattr(module.LOSSES["sft"].__class__, "needs", lambda self, options: frozenset({"values"}))
    with monkeypatch.context() as patch:
        fail(patch, PASS_SITES["loss"], 10**6)
        with pytest.raises(DeviceMemoryError):
            state.forward_backward(call)
    assert state.value is None and state.window.empty


@pytest.mark.parametrize("verb", ["forward_backward", "optim_step"])
def test_when_nothing_smaller_is_left_a_typed_error_says_so_and_nothing_has_changed(client, monkeypatch, verb):
    trainer = pending(client)
    before, said, plan = everything(trainer), [], inner(trainer).budget
    inner(trainer)._say = said.append
    with monkeypatch.context() as patch:
        visits = fail(patch, PASS_SITES["head"] if verb == "forward_backward" else STEP_SITES["norm"], 10**6)
        with pytest.raises(
            DeviceMemoryError, match=r"out of memory \(CUDA out of memory\), and no smaller plan"
        ) as caught:
            trainer.forward_backward(ROWS) if verb == "forward_backward" else trainer.optim_step()
    assert caught.value.exit_code == 4 and caught.value.__context__ is None
    assert 5 < len(visits) < 40 and len(said) == len(visits) - 1 and len(set(said)) > 3
    assert said[-1].startswith(
        "out of memory; the call is repeated, and from here on there are micro-batches of 64 tokens"
    )
    assert same(before, everything(trainer))
    assert inner(trainer).budget is plan  # what fits nowhere says nothing about the next call
    trainer.forward_backward(ROWS)
    assert trainer.optim_step().step == 2


def test_the_failed_attempts_tensors_are_gone_before_the_next_one(client, monkeypatch):
    """A traceback holds its frames' tensors; here also a reference cycle does, as autograd nodes can."""
    trainer, held, dead = pending(client), [], []
    real_batch, real_loss = module.micro_batch, module.loss_terms

    def batch(*args, **kwargs):
        dead.extend(ref() is None for ref in held)
        held.clear()
        return real_batch(*args, **kwargs)

    def loss(spec, out, *rest):
        if dead:
            return real_loss(spec, out, *rest)
        held.append(weakref.ref(out.logprobs))
        cycle = [out]
        cycle.append(cycle)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(module, "micro_batch", batch)
    monkeypatch.setattr(module, "loss_terms", loss)
    trainer.forward_backward(ROWS)
    assert dead == [True]


def test_other_errors_are_not_repeated(client, monkeypatch):
    trainer = pending(client)
    plan = inner(trainer).budget
    visits = fail(monkeypatch, PASS_SITES["loss"], 1, error=RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        trainer.forward_backward(ROWS)
    assert len(visits) == 1 and inner(trainer).budget is plan


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_counts_as_running_out(error, expected):
    assert is_out_of_memory(error) is expected


def test_making_a_trainer_that_finds_no_room_is_a_typed_error_too(service, tiny_model, monkeypatch):
    monkeypatch.setattr(local, "Trainer", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(DeviceMemoryError):
        service.create_lora_training_client(str(tiny_model), rank=4)


def test_weights_that_find_no_room_dequantised_are_not_held(service, tiny_model, monkeypatch):
    from local_tinker.model.loaded import LoadedModel

    fail(monkeypatch, (LoadedModel, "hold_weights"), 10**6)
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize="4bit")
    assert not inner(trainer).budget.hold_weights
    assert trainer.forward_backward(ROWS) > 0


def test_a_step_that_succeeds_at_once_steps_nothing_down():
    assert until_it_fits(lambda: 7, step_down=lambda: pytest.fail("stepped down")) == 7


def test_the_command_line_ends_with_4(monkeypatch, capsys):
    from local_tinker.cli import plan

    monkeypatch.setattr(plan.catalogue, "dims", lambda model: (_ for _ in ()).throw(DeviceMemoryError("no room")))
    assert app.main(["plan", "llama-3.1-8b"]) == 4
    assert "no room" in capsys.readouterr().err


# -- the longest documents first ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("waiting", [False, True])
def test_trying_the_longest_documents_leaves_everything_as_it_was(client, waiting):
    trainer = pending(client)
    if not waiting:
        trainer.optim_step()
    before, plan = everything(trainer), inner(trainer).budget
    trainer.try_longest([90, 30, 30])
    trainer.try_longest([20, 10], pairs=True)
    trainer.try_longest([])
    assert same(before, everything(trainer)) and inner(trainer).budget is plan


def test_trying_the_longest_documents_runs_the_first_micro_batch_and_settles_the_plan(client, monkeypatch):
    trainer, lengths = client(micro_batch_tokens=64), []
    plan, real = inner(trainer).budget, module.micro_batch
    monkeypatch.setattr(module, "micro_batch", lambda *a, **k: lengths.append(real(*a, **k).lengths) or real(*a, **k))
    with monkeypatch.context() as patch:
        fail(patch, PASS_SITES["backward"], 2)
        trainer.try_longest([20, 50, 10, 64])
    assert lengths == [(64,)] * 3
    assert inner(trainer).budget.total < plan.total and inner(trainer).window.empty
    trainer.try_longest([20, 12], pairs=True)
    assert lengths[-1] == (20, 20, 12, 12)
    monkeypatch.setattr(module, "loss_terms", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(DeviceMemoryError):
        trainer.try_longest([64])
