"""What holds for every loss: masking, cuts, precision, no wait for the device."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from local_tinker.losses import LOSSES, LossData, LossInputs, check_options, combine_metrics, finish_metrics

CASES = [
    ("sft", {}),
    ("dpo", {}),
    ("dpo", {"variant": "ipo", "beta": 0.3}),
    ("dpo", {"label_smoothing": 0.1, "reference_free": True}),
    ("grpo", {}),
    ("grpo", {"beta": 0.04, "kl_estimator": "k2", "aggregation": "sequence"}),
    ("grpo", {"beta": 0.04, "aggregation": "constant", "max_tokens": 16, "old_logprobs": "trainer"}),
    ("grpo", {"beta": 0.1, "old_logprobs": "trainer", "max_importance_ratio": 1.1}),
    ("grpo", {"clip_low": None, "clip_high": None, "max_importance_ratio": 1.1}),
    ("ppo_rollout", {}),
    ("ppo_rollout", {"value_clip": None, "old_logprobs": "trainer", "max_importance_ratio": 1.1}),
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("importance_sampling", {"max_importance_ratio": 1.1}),
    ("ppo", {}),
    ("cispo", {}),
    ("dro", {"beta": 0.1}),
    ("linear", {}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CASES]
every_loss = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def test_every_loss_is_covered_here():
    assert {name for name, _ in CASES} == set(LOSSES)


@every_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30, -800.0])
def test_what_stands_in_untrained_cells_changes_nothing(batch, name, options, poison):
    terms, grads = batch.run(name, **options)
    masked = batch.fields["weights"] == 0
    for group in (batch.out, batch.fields):
        for key, values in group.items():
            if key != "weights":
                group[key] = torch.where(masked, poison, values)
    poisoned, poisoned_grads = batch.run(name, **options)

    assert torch.equal(poisoned.total, terms.total)
    assert finish_metrics(poisoned.metrics) == finish_metrics(terms.metrics)
    for key, grad in grads.items():
        if grad is not None:
            assert torch.equal(poisoned_grads[key], grad)
            assert not grad[masked].any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_apart_logprobs_stay_finite(make_batch, name, options, dtype):
    for difference in (30.0, -30.0, 800.0, -800.0):
        batch = make_batch(dtype=dtype)
        batch.out["logprobs"] = batch.out["logprobs"] + difference * (torch.arange(14) % 3 == 0)
        terms, grads = batch.run(name, **options)
        assert torch.isfinite(terms.total)
        assert all(torch.isfinite(g).all() for g in grads.values() if g is not None)
        assert all(math.isfinite(value) for value in finish_metrics(terms.metrics).values())


@every_loss
def test_float32_agrees_with_float64(make_batch, name, options):
    wide, wide_grads = make_batch().run(name, **options)
    narrow, narrow_grads = make_batch(dtype=torch.float32).run(name, **options)
    assert narrow.total.dtype == torch.float32
    assert float(narrow.total.detach()) == pytest.approx(float(wide.total.detach()), rel=5e-6, abs=5e-6)
    for key, grad in wide_grads.items():
        if grad is not None:
            torch.testing.assert_close(narrow_grads[key].double(), grad, rtol=5e-6, atol=5e-6)


@every_loss
def test_no_loss_waits_for_the_device(batch, name, options):
    """On the meta device there are no values to read, so any read raises."""
    spec = LOSSES[name]
    resolved, _ = check_options(spec, options)
    meta = batch.data()
    fields = {k: v.to("meta") for k, v in meta.fields.items()}
    data = LossData(fields, meta.segments.to("meta"), meta.n_segments, meta.pairs.to("meta"))
    leaves = {k: v.to("meta").requires_grad_(k in ("logprobs", "values")) for k, v in batch.out.items()}
    terms = spec.fn(LossInputs(**leaves), data, **resolved)
    terms.total.backward()
    assert terms.total.shape == ()


@every_loss
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_any_cut_into_micro_batches_gives_the_same_sums(make_batch, name, options, draw):
    batch = make_batch(seed=draw.draw(st.integers(0, 50)))
    units = [[0, 1], [2, 3]] if name == "dpo" else [[0], [1], [2], [3]]
    order = draw.draw(st.permutations(units))
    cuts = draw.draw(st.lists(st.booleans(), min_size=len(order) - 1, max_size=len(order) - 1))
    parts = [list(order[0])]
    for unit, new in zip(order[1:], cuts, strict=True):
        if new:
            parts.append(list(unit))
        else:
            parts[-1] += unit

    whole, grads = batch.run(name, **options)
    cut = [(rows, *part.run(name, **options)) for part, rows in batch.cut(parts)]

    torch.testing.assert_close(sum(t.total for _, t, _ in cut), whole.total, rtol=1e-12, atol=1e-12)
    if LOSSES[name].normaliser == "weight":
        assert float(sum(t.weight for _, t, _ in cut)) == pytest.approx(float(whole.weight), rel=1e-12)
    for key, grad in grads.items():
        if grad is not None:
            joined = torch.zeros_like(grad)
            for rows, _, part_grads in cut:
                joined[rows] = part_grads[key]
            torch.testing.assert_close(joined, grad, rtol=1e-12, atol=1e-12)
    combined = finish_metrics(combine_metrics(t.metrics for _, t, _ in cut))
    assert combined == pytest.approx(finish_metrics(whole.metrics), rel=1e-12, abs=1e-12)


@every_loss
def test_more_untrained_tokens_change_neither_loss_nor_metrics(batch, name, options):
    terms, _ = batch.run(name, **options)
    starts = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]

    def padded(values, fill):
        rows = [torch.cat([torch.full((2,), fill), values[a:b], torch.full((5,), fill)]) for a, b in pairwise(starts)]
        return torch.cat(rows).double()

    batch.out = {k: padded(v, -7.0) for k, v in batch.out.items()}
    batch.fields = {k: padded(v, 0.0 if k == "weights" else -7.0) for k, v in batch.fields.items()}
    batch.lengths = tuple(n + 7 for n in batch.lengths)
    more, _ = batch.run(name, **options)

    torch.testing.assert_close(more.total, terms.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.as_tensor(more.weight), torch.as_tensor(terms.weight), rtol=1e-12, atol=0)
    assert finish_metrics(more.metrics) == pytest.approx(finish_metrics(terms.metrics), rel=1e-12)


@every_loss
def test_gradients_agree_with_finite_differences(batch, name, options):
    spec = LOSSES[name]
    resolved, _ = check_options(spec, options)
    fixed = {"old_logprobs": "trainer"} if resolved.get("old_logprobs") == "trainer" else {}
    weight_is_constant = name == "cispo" or resolved.get("max_importance_ratio") is not None and not fixed
    if weight_is_constant or resolved.get("beta") and name == "grpo":
        pytest.skip("its gradient is not the derivative of its value, by definition")

    def total(logprobs, values):
        out = LossInputs(logprobs, batch.out["entropy"], values, batch.out["reference_logprobs"])
        return spec.fn(out, batch.data(), **resolved).total

    inputs = (batch.out["logprobs"].requires_grad_(), batch.out["values"].requires_grad_())
    assert torch.autograd.gradcheck(total, inputs, eps=1e-6, atol=1e-6)
