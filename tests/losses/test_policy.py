import itertools
import math

import pytest
import torch

from local_tinker.errors import UsageError
from local_tinker.losses import LOSSES, LossData, LossInputs, check_options, finish_metrics


def one_token(name, ratio, advantage, *, sampling=-1.0, extra=None, out=None, **options):
    """Loss and dloss/dlogp of a single token whose probability is `ratio` times the sampler's."""
    logprobs = torch.tensor([sampling + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    fields = {"weights": [1.0], "logprobs": [sampling], "advantages": [advantage], **(extra or {})}
    fields = {k: torch.tensor(v, dtype=torch.float64) for k, v in fields.items()}
    inputs = {k: torch.tensor(v, dtype=torch.float64) for k, v in (out or {}).items()}
    options, _ = check_options(LOSSES[name], options)
    terms = LOSSES[name].fn(LossInputs(logprobs, **inputs), LossData(fields, torch.tensor([0]), 1), **options)
    (grad,) = torch.autograd.grad(terms.total, logprobs)
    return float(terms.total.detach()), float(grad), finish_metrics(terms.metrics)


# ratio, advantage -> loss, gradient. Limits 0.8 and 1.2: a token is cut only where its ratio has already gone the way
# its advantage pushes.
QUADRANTS = [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),
    (0.5, 2.0, -1.0, -1.0),
    (1.0, -2.0, 2.0, 2.0),
    (0.9, -2.0, 1.8, 1.8),
    (0.5, -2.0, 1.6, 0.0),
    (1.5, -2.0, 3.0, 3.0),
    (3.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.parametrize(("ratio", "advantage", "loss", "grad"), QUADRANTS)
def test_clip_cuts_only_what_has_gone_far_enough_its_own_way(name, ratio, advantage, loss, grad):
    got, got_grad, metrics = one_token(name, ratio, advantage)
    assert got == pytest.approx(loss, abs=1e-12)
    assert got_grad == pytest.approx(grad, abs=1e-12)
    assert metrics["clip_fraction_high"] == float(ratio > 1.2 and advantage > 0)
    assert metrics["clip_fraction_low"] == float(ratio < 0.8 and advantage < 0)
    assert metrics["ratio_mean"] == pytest.approx(ratio) == metrics["ratio_max"]
    assert metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "ratio", "advantage", "loss"),
    [
        (0.5, 0.2, 0.6, -1.0, 0.6),
        (0.5, 0.2, 0.4, -1.0, 0.5),
        (0.2, 0.28, 1.25, 1.0, -1.25),
        (0.2, 0.28, 1.3, 1.0, -1.28),
    ],
)
def test_grpo_clips_each_side_at_its_own_limit(low, high, ratio, advantage, loss):
    assert one_token("grpo", ratio, advantage, clip_low=low, clip_high=high)[0] == pytest.approx(loss, abs=1e-12)


def test_grpo_without_a_limit_on_one_side_is_free_there():
    assert one_token("grpo", 5.0, 1.0, clip_high=None)[:2] == pytest.approx((-5.0, -5.0))
    assert one_token("grpo", 0.1, -1.0, clip_low=None)[:2] == pytest.approx((0.1, 0.1))


def test_ppo_takes_thresholds_of_the_ratio_itself():
    loss, grad, _ = one_token("ppo", 1.5, 1.0, clip_low_threshold=0.9, clip_high_threshold=1.4)
    assert (loss, grad) == pytest.approx((-1.4, 0.0))


@pytest.mark.parametrize(("ratio", "advantage"), list(itertools.product([0.5, 1.0, 3.0], [1.5, -1.5])))
def test_importance_sampling_is_ratio_times_advantage(ratio, advantage):
    loss, grad, metrics = one_token("importance_sampling", ratio, advantage)
    assert (loss, grad) == pytest.approx((-ratio * advantage, -ratio * advantage))
    assert metrics["loss:sum"] == pytest.approx(loss)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (2.0, 2.0), (3.0, 2.0)])
def test_importance_sampling_truncates_its_weight_and_keeps_the_gradient(ratio, weight):
    loss, grad, _ = one_token("importance_sampling", ratio, 1.5, max_importance_ratio=2.0)
    assert (loss, grad) == pytest.approx((-weight * 1.5, -weight * 1.5))


@pytest.mark.parametrize(("ratio", "weight"), [(0.25, 0.25), (1.0, 1.0), (4.0, 4.0), (9.0, 4.0)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_holds_the_clipped_ratio_constant_on_both_sides(ratio, weight, advantage):
    loss, grad, metrics = one_token("cispo", ratio, advantage)
    assert grad == pytest.approx(-weight * advantage)
    assert loss == pytest.approx(-weight * advantage * (-1.0 + math.log(ratio)))
    assert metrics["clip_fraction"] == float(ratio > 4.0)


def test_cispo_has_a_floor_when_asked():
    assert one_token("cispo", 0.25, 1.0, clip_low_threshold=0.5)[1] == pytest.approx(-0.5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_dro_penalises_the_squared_log_ratio(beta):
    loss, grad, _ = one_token("dro", math.exp(0.5), 3.0, beta=beta)
    assert loss == pytest.approx(-(3.0 * -0.5 - 0.5 * beta * 0.25))
    assert grad == pytest.approx(-(3.0 - beta * 0.5))


def test_tinker_losses_are_sums_with_divisor_one_and_obey_given_weights(batch):
    for name, options in (("ppo", {}), ("importance_sampling", {}), ("cispo", {}), ("dro", {"beta": 0.1})):
        terms, _ = batch.run(name, **options)
        assert terms.weight == 1.0
        assert LOSSES[name].normaliser == "none"
        weights = batch.fields.pop("weights")
        everywhere, _ = batch.run(name, **options)
        batch.fields["advantages"], kept = batch.fields["advantages"] * weights, batch.fields["advantages"]
        if name != "dro":
            torch.testing.assert_close(batch.run(name, **options)[0].total, terms.total)
            assert not torch.isclose(everywhere.total, terms.total)
        batch.fields |= {"weights": weights, "advantages": kept}


def plain_grpo(batch, *, aggregation="token", max_tokens=None, beta=0.0, old="logprobs", cap=None):
    """Row by row, in the words of the definition: clip 0.2 on both sides, the importance-corrected k3."""
    out, fields = batch.out, batch.fields
    rows, start = [], 0
    for length in batch.lengths:
        losses = []
        for i in range(start, start + length):
            if not fields["weights"][i]:
                continue
            log_pi, advantage = float(out["logprobs"][i]), float(fields["advantages"][i])
            ratio = math.exp(log_pi - float(fields[old][i]))
            loss = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            if cap is not None:
                loss *= min(math.exp(float(fields[old][i]) - float(fields["logprobs"][i])), cap)
            x = float(out["reference_logprobs"][i]) - log_pi
            losses.append(loss + beta * ratio * (math.exp(x) - x - 1))
        rows.append(losses)
        start += length
    tokens = sum(map(len, rows))
    return {
        "token": (sum(map(sum, rows)), tokens),
        "sequence": (sum(sum(r) / len(r) for r in rows if r), sum(bool(r) for r in rows)),
        "constant": (sum(map(sum, rows)), sum(bool(r) for r in rows) * (max_tokens or 0)),
    }[aggregation]


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("empty_row", [False, True])
def test_grpo_aggregations_equal_the_plain_formula(batch, aggregation, beta, empty_row):
    options = {"max_tokens": 16} if aggregation == "constant" else {}
    if empty_row:
        batch.fields["weights"][4] = 0.0
    terms, _ = batch.run("grpo", aggregation=aggregation, beta=beta, **options)
    total, weight = plain_grpo(batch, aggregation=aggregation, beta=beta, **options)
    assert float(terms.total.detach()) == pytest.approx(total, abs=1e-12)
    assert float(terms.weight) == weight


@pytest.mark.parametrize("cap", [None, 1.05, 10.0])
def test_grpo_with_the_trainers_old_logprobs_equals_the_plain_formula(batch, cap):
    terms, _ = batch.run("grpo", old_logprobs="trainer", max_importance_ratio=cap)
    assert float(terms.total.detach()) == pytest.approx(plain_grpo(batch, old="old_logprobs", cap=cap)[0], abs=1e-12)


@pytest.mark.parametrize(("old", "weight"), [(-0.5, math.exp(0.5)), (-0.1, 2.0), (-3.0, math.exp(-2.0))])
def test_the_correction_to_the_sampler_is_capped_and_constant(old, weight):
    # pi = 1.1 pi_old, sampler at -1: min(pi_old / pi_sampler, 2) times the surrogate.
    extra = {"old_logprobs": [old]}
    ratio = math.exp(old + math.log(1.1) + 1.0)
    options = {"old_logprobs": "trainer", "max_importance_ratio": 2.0}
    loss, grad, metrics = one_token("grpo", ratio, 1.0, extra=extra, **options)
    assert (loss, grad) == pytest.approx((-weight * 1.1, -weight * 1.1))
    assert metrics["importance_ratio_max"] == pytest.approx(math.exp(old + 1.0))


def test_a_first_pass_with_the_trainers_old_logprobs_has_ratio_one(batch):
    del batch.fields["old_logprobs"]
    terms, grads = batch.run("grpo", old_logprobs="trainer")
    trained = batch.fields["weights"] != 0
    assert finish_metrics(terms.metrics)["ratio_max"] == 1.0
    torch.testing.assert_close(grads["logprobs"][trained], -batch.fields["advantages"][trained])


def test_unclipped_truncation_has_the_truncated_policy_gradient():
    options = {"clip_low": None, "clip_high": None, "max_importance_ratio": 2.0}
    for ratio, weight in ((0.5, 0.5), (3.0, 2.0)):
        assert one_token("grpo", ratio, -1.5, **options)[:2] == pytest.approx((weight * 1.5, weight * 1.5))


def test_on_policy_grpo_has_the_gradient_of_importance_sampling(batch):
    batch.out["logprobs"] = batch.fields["logprobs"].clone()
    _, clipped = batch.run("grpo")
    _, sampled = batch.run("importance_sampling")
    torch.testing.assert_close(clipped["logprobs"], sampled["logprobs"], rtol=0, atol=0)


VOCABULARY = 5


def exact_kl_gradient(logits, reference):
    log_pi = torch.log_softmax(logits, 0)
    (grad,) = torch.autograd.grad((log_pi.exp() * (log_pi - reference)).sum(), logits)
    return grad


@pytest.mark.parametrize("estimator", ["k3", "k2"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_expected_gradient_of_each_kl_estimator_is_that_of_the_kl(estimator, off_policy):
    """Every token of a small vocabulary once, weighted by the probability that the old policy samples it."""
    generator = torch.Generator().manual_seed(3)
    logits, shift, other = torch.randn(3, VOCABULARY, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    reference = torch.log_softmax(other, 0)
    log_pi = torch.log_softmax(logits, 0)
    old = torch.log_softmax(logits.detach() + shift * off_policy, 0)
    fields = {"weights": old.exp(), "logprobs": old, "advantages": torch.zeros_like(old)}
    options, _ = check_options(LOSSES["grpo"], {"beta": 1.0, "kl_estimator": estimator})
    data = LossData(fields, torch.zeros(VOCABULARY, dtype=torch.int64), 1)
    terms = LOSSES["grpo"].fn(LossInputs(log_pi, reference_logprobs=reference), data, **options)
    (grad,) = torch.autograd.grad(terms.total, logits, retain_graph=True)

    torch.testing.assert_close(grad, exact_kl_gradient(logits, reference), rtol=0, atol=1e-12)
    if estimator == "k3":
        kl = (log_pi.exp() * (log_pi - reference)).sum()
        assert float(terms.total.detach()) == pytest.approx(float(kl.detach()), abs=1e-12)


def test_the_plain_estimators_would_have_other_gradients():
    """Why k1 and the uncorrected k3 are not offered."""
    generator = torch.Generator().manual_seed(3)
    logits, other = torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    log_pi, reference = torch.log_softmax(logits, 0), torch.log_softmax(other, 0)
    weights, x = log_pi.exp().detach(), reference - log_pi
    (k1,) = torch.autograd.grad((weights * -x).sum(), logits, retain_graph=True)
    (k3,) = torch.autograd.grad((weights * (x.exp() - x - 1)).sum(), logits)
    right = exact_kl_gradient(logits, reference)
    assert float(k1.abs().max()) < 1e-12
    assert float((k3 - right).abs().max()) > 0.1


@pytest.mark.parametrize("x", [1e-4, -1e-4, 0.9, 1.1, -1.1, 30.0, -30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_accurate_near_and_far(x, dtype):
    from local_tinker.losses.policy import kl_to_reference

    logprobs = torch.tensor([-2.0 - x], dtype=dtype, requires_grad=True)
    log_ratio, mask = torch.tensor([0.25], dtype=dtype), torch.tensor([True])
    exact_x = float(torch.tensor([-2.0], dtype=dtype) - logprobs.detach())
    kl = kl_to_reference(logprobs, torch.tensor([-2.0], dtype=dtype), log_ratio, mask, "k3")
    want = math.exp(0.25) * (math.expm1(exact_x) - exact_x)
    assert float(kl.detach()) == pytest.approx(want, rel=2e-6, abs=1e-10)
    kl.sum().backward()
    assert float(logprobs.grad) == pytest.approx(-math.exp(0.25) * exact_x, rel=1e-6)


def test_grpo_reports_entropy_kl_length_and_gap_over_trained_tokens(batch):
    batch.fields["own_version"][4] = 0.0
    terms, _ = batch.run("grpo", beta=0.1, kl_estimator="k2")
    metrics, trained = finish_metrics(terms.metrics), batch.fields["weights"] != 0
    gap = (batch.out["logprobs"] - batch.fields["logprobs"]).abs()
    own = trained & (torch.arange(14) != 4)
    ratio = (batch.out["logprobs"] - batch.fields["logprobs"]).exp()
    kl = ratio * (batch.out["reference_logprobs"] - batch.out["logprobs"]) ** 2 / 2
    assert metrics["entropy"] == pytest.approx(float(batch.out["entropy"][trained].mean()))
    assert metrics["kl"] == pytest.approx(float(kl[trained].mean()))
    assert metrics["completion_length"] == (2 + 1 + 4 + 2) / 4
    assert metrics["logprob_gap_mean"] == pytest.approx(float(gap[own].mean()))
    assert metrics["logprob_gap_max"] == pytest.approx(float(gap[own].max()))
    assert metrics["ratio_max"] == pytest.approx(float(ratio[trained].max()))


def test_no_gap_is_reported_for_completions_of_other_versions(batch):
    batch.fields["own_version"].zero_()
    assert "logprob_gap_mean" not in finish_metrics(batch.run("grpo")[0].metrics)


def test_the_reference_is_needed_only_with_a_kl_term():
    needs = LOSSES["grpo"].needs
    assert needs({"beta": 0.0}) == {"entropy"}
    assert needs({"beta": 0.1}) == {"entropy", "reference"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("grpo", {"clip_low": -0.1}, "clip_low must be a finite number >= 0 and <= 1, got -0.1"),
        ("grpo", {"clip_high": math.nan}, "clip_high must be a finite number"),
        ("grpo", {"aggregation": "batch"}, "aggregation must be one of 'token', 'sequence', 'constant'"),
        ("grpo", {"aggregation": "constant"}, "give max_tokens="),
        ("grpo", {"max_tokens": 8}, "max_tokens is only read by aggregation='constant'"),
        ("grpo", {"aggregation": "constant", "max_tokens": 0}, "max_tokens must be a finite number >= 1"),
        ("grpo", {"aggregation": "constant", "max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5"),
        ("grpo", {"kl_estimator": "k1"}, "kl_estimator must be one of 'k3', 'k2', got 'k1'"),
        ("grpo", {"beta": -0.1}, "beta must be a finite number >= 0"),
        ("grpo", {"old_logprobs": "vllm"}, "old_logprobs must be one of 'sampler', 'trainer'"),
        ("grpo", {"max_importance_ratio": 2.0}, "old_logprobs='sampler' and a clip"),
        ("grpo", {"clip_low": None, "max_importance_ratio": 2.0}, "old_logprobs='sampler' and a clip"),
        ("grpo", {"old_logprobs": "trainer", "max_importance_ratio": 0}, "max_importance_ratio must be"),
        ("grpo", {"scale_rewards": True}, "scale_rewards must be one of 'group', 'batch', 'none'"),
        ("grpo", {"clip_range": 0.2}, "no option 'clip_range'"),
        ("ppo", {"clip_low_threshold": 1.3}, "is above clip_high_threshold=1.2"),
        ("ppo", {"clip_low": 0.2}, "write clip_low_threshold"),
        ("cispo", {"clip_high_threshold": math.inf}, "clip_high_threshold must be a finite number"),
        ("dro", {}, "'dro' needs beta=: it has no default"),
        ("importance_sampling", {"max_importance_ratio": -1}, "max_importance_ratio must be"),
        ("sft", {"beta": 1.0}, "'sft' has no option 'beta' .its options: none"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words):
        check_options(LOSSES[name], options)


def test_estimator_options_are_separated_from_those_of_the_loss():
    loss, estimator = check_options(LOSSES["grpo"], {"scale_rewards": "none", "clip_high": 0.28})
    assert estimator == {"scale_rewards": "none"}
    assert loss["clip_high"] == 0.28
    assert "scale_rewards" not in loss
