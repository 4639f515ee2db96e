import math

import pytest
import torch

from local_tinker.losses import LOSSES, LossData, LossInputs, finish_metrics

LOGPROBS = [-1.0, -2.0, -0.5, -4.0]


def run(name, weights, logprobs=LOGPROBS):
    logprobs = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    segments = torch.zeros(len(logprobs), dtype=torch.int64)
    data = LossData({"weights": torch.tensor(weights, dtype=torch.float64)}, segments, 1)
    terms = LOSSES[name].fn(LossInputs(logprobs), data)
    (grad,) = torch.autograd.grad(terms.total, logprobs)
    return terms, grad.tolist()


def test_sft_is_the_negative_log_likelihood_of_the_trained_tokens_and_their_number():
    terms, grad = run("sft", [0.0, 1.0, 1.0, 0.0])
    assert float(terms.total) == 2.5
    assert float(terms.weight) == 2.0
    assert grad == [0.0, -1.0, -1.0, 0.0]
    assert finish_metrics(terms.metrics) == {"nll": 1.25}


def test_sft_weights_scale_loss_and_normaliser_alike():
    terms, grad = run("sft", [0.5, 0.0, 2.0, 0.0])
    assert float(terms.total) == 0.5 * 1.0 + 2.0 * 0.5
    assert float(terms.weight) == 2.5
    assert grad == [-0.5, 0.0, -2.0, 0.0]


def test_a_window_is_the_mean_over_its_tokens_not_the_mean_of_its_micro_batches():
    # Two micro-batches: one token of loss 4, three of loss 1. Tokens: 7/4. Micro-batches: (4 + 1) / 2.
    first, _ = run("sft", [1.0], [-4.0])
    second, _ = run("sft", [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0])
    assert float((first.total + second.total) / (first.weight + second.weight)) == 1.75


def test_cross_entropy_is_a_sum_with_divisor_one():
    terms, grad = run("cross_entropy", [0.0, 1.0, 0.5, 0.0])
    assert float(terms.total) == 2.25
    assert terms.weight == 1.0
    assert LOSSES["cross_entropy"].normaliser == "none"
    assert grad == [0.0, -1.0, -0.5, 0.0]
    assert finish_metrics(terms.metrics) == {"loss:sum": 2.25}


def test_cross_entropy_takes_several_targets_a_position():
    logprobs = [[-1.0, -3.0], [-2.0, math.nan]]
    terms, grad = run("cross_entropy", [[0.75, 0.25], [1.0, 0.0]], logprobs)
    assert float(terms.total) == 0.75 + 0.75 + 2.0
    assert grad == [[-0.75, -0.25], [-1.0, 0.0]]


def test_linear_has_its_weights_for_a_gradient():
    terms, grad = run("linear", [0.5, -1.0, 0.0, 3.0])
    assert float(terms.total) == -0.5 + 2.0 - 12.0
    assert grad == [0.5, -1.0, 0.0, 3.0]


def test_linear_carries_the_gradient_of_any_loss_of_the_logprobs():
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.logsumexp(logprobs * 3, 0) ** 2, logprobs)
    _, grad = run("linear", expected.tolist())
    assert grad == pytest.approx(expected.tolist(), rel=1e-15)
