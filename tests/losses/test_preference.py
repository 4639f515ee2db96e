import math

import pytest
import torch

from local_tinker.errors import UsageError
from local_tinker.losses import LOSSES, check_options, finish_metrics

PAIRS = [(0, 1), (3, 2)]


def rows(batch, segment):
    start = sum(batch.lengths[:segment])
    trained = [i for i in range(start, start + batch.lengths[segment]) if batch.fields["weights"][i]]
    return trained


def plain(batch, beta, label_smoothing=0.0, variant="sigmoid", reference_free=False):
    """Pair by pair in Python floats."""
    losses = []
    for chosen, rejected in PAIRS:
        h = {}
        for side, segment in (("w", chosen), ("l", rejected)):
            gains = [
                float(batch.out["logprobs"][i]) - (0 if reference_free else float(batch.out["reference_logprobs"][i]))
                for i in rows(batch, segment)
            ]
            h[side] = sum(gains) / (len(gains) if variant == "ipo" else 1)
        d = h["w"] - h["l"]
        if variant == "ipo":
            losses.append((d - 1 / (2 * beta)) ** 2)
        else:
            right, wrong = math.log1p(math.exp(-beta * d)), math.log1p(math.exp(beta * d))
            losses.append((1 - label_smoothing) * right + label_smoothing * wrong)
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"beta": 0.7},
        {"beta": 0.1, "label_smoothing": 0.2},
        {"beta": 0.1, "variant": "ipo"},
        {"beta": 0.5, "variant": "ipo"},
        {"beta": 0.3, "reference_free": True},
        {"beta": 0.3, "variant": "ipo", "reference_free": True},
    ],
    ids=str,
)
def test_dpo_equals_the_plain_formula(batch, options):
    terms, _ = batch.run("dpo", **options)
    assert float(terms.total) == pytest.approx(sum(plain(batch, **options)), abs=1e-12)
    assert terms.weight == 2.0


def test_dpo_by_hand():
    # chosen log-ratios 0.5 and 0.25, rejected -0.25: d = 1, beta 2: -log sigmoid(2).
    from local_tinker.losses import LossData, LossInputs

    logprobs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.25, -0.75], dtype=torch.float64)
    data = LossData({"weights": torch.ones(3, dtype=torch.float64)}, torch.tensor([0, 0, 1]), 2, torch.tensor([[0, 1]]))
    options, _ = check_options(LOSSES["dpo"], {"beta": 2.0})
    terms = LOSSES["dpo"].fn(LossInputs(logprobs, reference_logprobs=reference), data, **options)
    assert float(terms.total) == pytest.approx(0.1269280110429726, abs=1e-15)
    (grad,) = torch.autograd.grad(terms.total, logprobs)
    # -beta sigmoid(-2) on every chosen token, +beta sigmoid(-2) on every rejected one.
    assert grad.tolist() == pytest.approx([-0.2384058440442351, -0.2384058440442351, 0.2384058440442351], abs=1e-15)
    assert finish_metrics(terms.metrics) == pytest.approx(
        {
            "reward_margin": 2.0,
            "accuracy": 1.0,
            "chosen_reward": 1.5,
            "rejected_reward": -0.5,
            "chosen_logprobs": -2.0,
            "rejected_logprobs": -1.0,
        }
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_policy_equal_to_its_reference_starts_at_ln_2_and_still_learns(make_batch, dtype):
    batch = make_batch(dtype=dtype)
    batch.out["reference_logprobs"] = batch.out["logprobs"].clone()
    terms, grads = batch.run("dpo")
    assert float(terms.total) / 2 == pytest.approx(math.log(2), abs=1e-6 if dtype == torch.float32 else 1e-15)
    trained = batch.fields["weights"] != 0
    assert grads["logprobs"][trained].abs().tolist() == pytest.approx([0.05] * int(trained.sum()), rel=1e-6)


def test_ipo_pulls_the_mean_log_ratio_to_its_target(batch):
    # When the difference of means is exactly 1 / (2 beta), loss and gradient are 0.
    batch.out["reference_logprobs"] = batch.out["logprobs"].clone()
    chosen = [i for pair in PAIRS for i in rows(batch, pair[0])]
    batch.out["reference_logprobs"][chosen] -= 1 / (2 * 0.25)
    terms, grads = batch.run("dpo", variant="ipo", beta=0.25)
    assert float(terms.total) == pytest.approx(0.0, abs=1e-24)
    assert float(grads["logprobs"].abs().max()) < 1e-12


def test_label_smoothing_of_one_half_has_no_gradient_at_the_reference(batch):
    batch.out["reference_logprobs"] = batch.out["logprobs"].clone()
    _, grads = batch.run("dpo", label_smoothing=0.5)
    assert float(grads["logprobs"].abs().max()) < 1e-15


def test_accuracy_counts_pairs_whose_chosen_reward_is_strictly_greater(batch):
    batch.out["reference_logprobs"] = batch.out["logprobs"].clone()
    assert finish_metrics(batch.run("dpo")[0].metrics)["accuracy"] == 0.0
    batch.out["reference_logprobs"][rows(batch, 0)] -= 1.0
    assert finish_metrics(batch.run("dpo")[0].metrics)["accuracy"] == 0.5


def test_the_reference_is_needed_unless_reference_free():
    needs = LOSSES["dpo"].needs
    assert needs({"reference_free": False}) == {"reference"}
    assert needs({"reference_free": True}) == frozenset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta must be a finite number > 0, got 0.0"),
        ({"beta": True}, "beta must be a finite number"),
        ({"beta": "0.1"}, "got '0.1'"),
        ({"label_smoothing": 0.6}, "label_smoothing must be a finite number >= 0 and <= 0.5"),
        ({"variant": "hinge"}, "variant must be one of 'sigmoid', 'ipo', got 'hinge'"),
        ({"variant": "ipo", "label_smoothing": 0.1}, "label_smoothing belongs to variant='sigmoid'"),
        ({"reference_fre": True}, "no option 'reference_fre': write reference_free"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        check_options(LOSSES["dpo"], options)
