import math

import pytest
import torch

from local_tinker.advantages import gae, whiten
from local_tinker.errors import UsageError
from local_tinker.losses import LOSSES, LossData, LossInputs, check_options, finish_metrics
from local_tinker.losses.value import value_losses


@pytest.mark.parametrize(
    # value, old value, return, clip -> loss, gradient of the loss, clipped term larger
    ("value", "old", "target", "clip", "loss", "grad", "clipped"),
    [
        (1.0, 1.0, 2.0, 0.2, 0.5, -1.0, False),
        (1.1, 1.0, 2.0, 0.2, 0.405, -0.9, False),
        (1.5, 1.0, 2.0, 0.2, 0.32, 0.0, True),
        (0.5, 1.0, 2.0, 0.2, 1.125, -1.5, False),
        (1.5, 1.0, 0.0, 0.2, 1.125, 1.5, False),
        (0.5, 1.0, 0.0, 0.2, 0.32, 0.0, True),
        (1.5, 1.0, 2.0, None, 0.125, -0.5, False),
        (0.5, 1.0, 2.0, None, 1.125, -1.5, False),
        (0.5, 1.0, 0.0, None, 0.125, 0.5, False),
        (1.5, 1.0, 2.0, 1.0, 0.125, -0.5, False),
    ],
)
def test_the_value_clip_cuts_only_what_has_gone_far_enough_towards_its_return(
    value, old, target, clip, loss, grad, clipped
):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    losses, was = value_losses(values, torch.tensor([old]).double(), torch.tensor([target]).double(), clip)
    losses.sum().backward()
    assert float(losses.detach()) == pytest.approx(loss, abs=1e-12)
    assert float(values.grad) == pytest.approx(grad, abs=1e-12)
    assert bool(was) is clipped


def plain(batch, *, low=0.8, high=1.2, value_clip=0.2, coefficient=0.5, old="logprobs", cap=None):
    policy = value = tokens = 0.0
    for i in range(14):
        if not batch.fields["weights"][i]:
            continue
        f = {
            k: float(v[i]) for k, v in (batch.fields | {"pi": batch.out["logprobs"], "v": batch.out["values"]}).items()
        }
        ratio, a = math.exp(f["pi"] - f[old]), f["advantages"]
        scale = 1.0 if cap is None else min(math.exp(f[old] - f["logprobs"]), cap)
        policy -= scale * min(ratio * a, min(max(ratio, low), high) * a)
        near = (f["v"] - f["returns"]) ** 2
        if value_clip is not None:
            bounded = min(max(f["v"], f["old_values"] - value_clip), f["old_values"] + value_clip)
            near = max(near, (bounded - f["returns"]) ** 2)
        value += near / 2
        tokens += 1
    return policy + coefficient * value, tokens, policy / tokens, value / tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, {}),
        ({"clip_low": 0.1, "clip_high": 0.5}, {"low": 0.9, "high": 1.5}),
        ({"value_clip": None}, {"value_clip": None}),
        ({"value_clip": 0.05}, {"value_clip": 0.05}),
        ({"value_coefficient": 0.1}, {"coefficient": 0.1}),
        ({"old_logprobs": "trainer", "max_importance_ratio": 1.05}, {"old": "old_logprobs", "cap": 1.05}),
    ],
    ids=str,
)
def test_ppo_equals_the_plain_formula(batch, options, words):
    terms, _ = batch.run("ppo_rollout", **options)
    total, tokens, policy, value = plain(batch, **words)
    metrics = finish_metrics(terms.metrics)
    assert float(terms.total.detach()) == pytest.approx(total, abs=1e-12)
    assert float(terms.weight) == tokens
    assert metrics["policy_loss"] == pytest.approx(policy, abs=1e-12)
    assert metrics["value_loss"] == pytest.approx(value, abs=1e-12)


def test_ppo_reports_values_returns_and_clips_over_trained_tokens(batch):
    metrics = finish_metrics(batch.run("ppo_rollout")[0].metrics)
    trained = batch.fields["weights"] != 0
    moved = (batch.out["values"] - batch.fields["old_values"]).clamp(-0.2, 0.2) + batch.fields["old_values"]
    clipped = (moved - batch.fields["returns"]) ** 2 > (batch.out["values"] - batch.fields["returns"]) ** 2
    assert metrics["value_mean"] == pytest.approx(float(batch.out["values"][trained].mean()))
    assert metrics["return_mean"] == pytest.approx(float(batch.fields["returns"][trained].mean()))
    assert metrics["value_clip_fraction"] == pytest.approx(float(clipped[trained].double().mean()))
    assert 0 < metrics["value_clip_fraction"] < 1
    assert metrics["entropy"] == pytest.approx(float(batch.out["entropy"][trained].mean()))


def test_the_value_coefficient_scales_the_value_gradient_alone(batch):
    _, half = batch.run("ppo_rollout")
    _, whole = batch.run("ppo_rollout", value_coefficient=1.0)
    _, none = batch.run("ppo_rollout", value_coefficient=0.0)
    torch.testing.assert_close(whole["values"], 2 * half["values"])
    assert not none["values"].any()
    torch.testing.assert_close(whole["logprobs"], half["logprobs"], rtol=0, atol=0)


def test_a_whole_ppo_step_passes_gradcheck_through_policy_and_value_head():
    """A linear policy over states and a linear value head; advantages and returns by GAE from the old ones."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    policy = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    head = torch.randn(4, generator=generator, dtype=torch.float64)
    actions = torch.tensor([0, 3, 1, 4, 2, 0])
    trained = [True, True, False, True, True, True]
    rows = torch.arange(6)
    old = torch.log_softmax(states @ policy, -1)[rows, actions]
    old_values = states @ head
    rewards = [0.0, 0.5, 0.0, 0.0, 0.0, 1.0]
    advantages, returns = gae(rewards, old_values.numpy(), trained=trained, terminal=True, gamma=0.9)
    (advantages,) = whiten([advantages], [trained])
    fields = {
        "weights": torch.tensor(trained).double(),
        "logprobs": old,
        "advantages": torch.from_numpy(advantages),
        "returns": torch.from_numpy(returns),
        "old_values": old_values,
    }
    data = LossData(fields, torch.zeros(6, dtype=torch.int64), 1)
    options, _ = check_options(LOSSES["ppo_rollout"], {})

    def step(policy, head):
        logprobs = torch.log_softmax(states @ policy, -1)[rows, actions]
        terms = LOSSES["ppo_rollout"].fn(LossInputs(logprobs, values=states @ head), data, **options)
        return terms.total / terms.weight

    moved = (policy + 0.05, head * 1.1)
    moved = (moved[0] + 0.1 * torch.randn(4, 5, generator=generator, dtype=torch.float64), moved[1])
    assert torch.autograd.gradcheck(step, tuple(t.requires_grad_() for t in moved), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"value_clip": 0.0}, "value_clip must be a finite number > 0"),
        ({"value_coefficient": -1.0}, "value_coefficient must be a finite number >= 0"),
        ({"gamma": 1.1}, "gamma must be a finite number >= 0 and <= 1"),
        ({"gae_lambda": -0.1}, "gae_lambda must be"),
        ({"beta": math.inf}, "beta must be"),
        ({"max_importance_ratio": 2.0}, "old_logprobs='sampler' and a clip"),
        ({"lam": 0.9}, "'ppo' on completions has no option 'lam'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        check_options(LOSSES["ppo_rollout"], options)


def test_gae_options_belong_to_the_estimator():
    loss, estimator = check_options(LOSSES["ppo_rollout"], {"gamma": 0.99})
    assert estimator == {"gamma": 0.99, "gae_lambda": 0.95, "beta": 0.0}
    assert not set(estimator) & set(loss)
