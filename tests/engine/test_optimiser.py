import pytest
import torch

from local_tinker.engine import optimiser as module
from local_tinker.engine.optimiser import FlatAdamW, GradientWindow, clip
from local_tinker.types import AdamParams


def step(optimiser, gradient, params):
    window = GradientWindow(gradient.numel(), gradient.dtype, gradient.device)
    window.buffer("sft").copy_(gradient)
    window.add_weight("sft", 1.0)
    factor, norm, bad = clip([window.norm()], params.grad_clip_norm)
    optimiser.prepare(window, params, factor=factor, bad=bad)()
    assert torch.equal(window.buffer("sft"), gradient) or not torch.isfinite(norm)
    return norm, bad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.float64, 1e-14)])
def test_a_hundred_steps_equal_torch_adamw_with_a_rate_that_changes_each_step(dtype, tolerance):
    torch.manual_seed(0)
    ours = torch.randn(500, dtype=dtype) * 0.1
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.AdamW([theirs], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimiser = FlatAdamW(ours)
    for i in range(100):
        gradient = torch.randn(500, dtype=dtype) * (0.01 if i % 3 else 1.0)  # clipped every third step
        rate = 1e-3 * (1 + i % 7)
        theirs.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        reported, skipped = step(optimiser, gradient, AdamParams(learning_rate=rate, weight_decay=0.1))
        assert float(reported) == pytest.approx(float(norm), rel=1e-5) and skipped == 0
    assert float((ours - theirs.detach()).abs().max()) < tolerance
    assert int(optimiser.count) == 100


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_changes_no_bit(value):
    master = torch.randn(50)
    optimiser = FlatAdamW(master)
    step(optimiser, torch.randn(50), AdamParams())
    before = [t.clone() for t in (master, optimiser.m, optimiser.v, optimiser.count)]
    bad = torch.randn(50)
    bad[7] = value
    _, skipped = step(optimiser, bad, AdamParams())
    assert skipped == 1
    for now, then in zip((master, optimiser.m, optimiser.v, optimiser.count), before, strict=True):
        assert torch.equal(now, then)


def test_clip_zero_turns_clipping_off():
    master = torch.zeros(4, dtype=torch.float64)
    gradient = torch.tensor([300.0, -400.0, 0.0, 0.0], dtype=torch.float64)
    norm, _ = step(FlatAdamW(master), gradient, AdamParams(learning_rate=1.0, grad_clip_norm=0.0, eps=100.0))
    # First step: m / (1 - b1) = g, sqrt(v / (1 - b2)) = |g|; update = g / (|g| + eps)
    assert float(norm) == 500.0
    assert master.tolist() == pytest.approx([-0.75, 0.8, 0.0, 0.0])


def test_updates_below_a_bf16_step_are_not_swallowed():
    master = torch.ones(1)
    optimiser = FlatAdamW(master)
    for _ in range(1000):
        step(optimiser, torch.ones(1), AdamParams(learning_rate=1e-4))
    assert float(master) == pytest.approx(0.9, rel=1e-4)
    assert float(master.bfloat16()) != 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parked_moments_give_the_bits_of_resident_ones(monkeypatch, dtype):
    monkeypatch.setattr(module, "MOMENT_SLICE", 64)  # 500 parameters are then eight slices, the last one short
    torch.manual_seed(0)
    masters = [torch.randn(500, dtype=dtype)]
    masters.append(masters[0].clone())
    resident, parked = FlatAdamW(masters[0]), FlatAdamW(masters[1], parked=True)
    for i in range(20):
        gradient = torch.randn(500, dtype=dtype)
        gradient[3] = float("inf") if i == 7 else 1.0
        for optimiser in (resident, parked):
            step(optimiser, gradient, AdamParams(learning_rate=1e-2, weight_decay=0.1))
        if i == 12:  # to the device and back between two steps
            parked.park(False)
            parked.park(True)
    for a, b in zip(
        (masters[0], resident.m, resident.v, resident.count),
        (masters[1], parked.m, parked.v, parked.count),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert parked.parked and int(parked.count) == 19 and float(parked.m.abs().max()) > 0


@pytest.mark.parametrize("parked", [True, False])
def test_moments_that_find_no_room_where_they_should_go_stay_where_they_were(monkeypatch, parked):
    optimiser, empty, made = FlatAdamW(torch.ones(5), parked=parked), torch.empty, []
    step(optimiser, torch.ones(5), AdamParams())

    def full(*size, **options):
        made.append(size)
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            optimiser.park(not parked)
    assert optimiser.parked is parked and len(made) == 2
    step(optimiser, torch.ones(5), AdamParams())
    assert int(optimiser.count) == 2


def test_a_step_in_slices_is_the_step_of_the_whole(monkeypatch):
    torch.manual_seed(0)
    whole = torch.randn(500)
    sliced, gradient = whole.clone(), torch.randn(500)
    step(FlatAdamW(whole), gradient, AdamParams(learning_rate=1e-2))
    monkeypatch.setattr(module, "MOMENT_SLICE", 64)
    step(FlatAdamW(sliced), gradient, AdamParams(learning_rate=1e-2))
    assert torch.equal(whole, sliced)


def window():
    return GradientWindow(2, torch.float64, torch.device("cpu"))


def test_one_normaliser_divides_the_sum_of_gradients_by_the_sum_of_weights():
    w = window()
    for gradient, weight in (([2.0, 4.0], 3.0), ([1.0, 0.0], 1.0)):
        w.buffer("sft").add_(torch.tensor(gradient, dtype=torch.float64))
        w.add_weight("sft", weight)
        w.calls += 1
    assert w.gradient().tolist() == [0.75, 1.0]


def test_two_losses_are_separately_normalised_terms_that_add():
    w = window()
    w.buffer("sft").add_(torch.tensor([8.0, 0.0]))
    w.add_weight("sft", 4.0)
    w.buffer("none").add_(torch.tensor([1.0, 1.0]))
    w.add_weight("none", 1.0)
    w.add_weight("none", 1.0)  # sums keep divisor 1
    w.calls = 3
    assert w.gradient().tolist() == [3.0, 1.0]


def test_restore_brings_back_gradients_weights_and_calls():
    w = window()
    empty = w.backup()
    assert empty.buffers == {}
    w.buffer("sft").add_(1.0)
    w.add_weight("sft", 2.0)
    w.calls = 1
    kept = w.backup()
    w.buffer("sft").add_(5.0)
    w.buffer("dpo").add_(5.0)
    w.add_weight("dpo", 1.0)
    w.calls = 2
    w.restore(kept)
    assert w.gradient().tolist() == [0.5, 0.5] and w.calls == 1
    w.restore(empty)
    assert w.empty and w.buffer("sft").tolist() == [0.0, 0.0]
