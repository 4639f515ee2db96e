import math

import pytest
import torch

from local_tinker.losses import Max, Mean, Sum, combine_metrics, finish_metrics


def test_means_combine_by_sum_and_count_maxima_by_maximum_and_sums_by_sum():
    first = {"m": Mean(torch.tensor(3.0), torch.tensor(1)), "x": Max(torch.tensor(2.0)), "s": Sum(torch.tensor(1.5))}
    second = {"m": Mean(torch.tensor(3.0), torch.tensor(3)), "x": Max(torch.tensor(5.0)), "s": Sum(torch.tensor(1.0))}
    assert finish_metrics(combine_metrics([first, second])) == {"m": 1.5, "x": 5.0, "s": 2.5}


def test_a_metric_of_one_micro_batch_only_is_kept():
    assert finish_metrics(combine_metrics([{"a": Mean(1.0, 2.0)}, {"b": Mean(6.0, 2.0)}])) == {"a": 0.5, "b": 3.0}


def test_a_metric_over_nothing_is_left_out():
    nothing = {"m": Mean(torch.tensor(0.0), torch.tensor(0)), "x": Max(torch.tensor(-math.inf))}
    assert finish_metrics(nothing) == {}
    something = {"m": Mean(torch.tensor(2.0), torch.tensor(1)), "x": Max(torch.tensor(-3.0))}
    assert finish_metrics(combine_metrics([nothing, something])) == {"m": 2.0, "x": -3.0}
    assert finish_metrics({}) == {}


def test_metrics_carry_no_gradient_and_are_plain_floats():
    value = torch.tensor(2.0, requires_grad=True)
    finished = finish_metrics({"m": Mean(value * 2, 4), "s": Sum(value)})
    assert finished == {"m": 1.0, "s": 2.0}
    assert all(type(v) is float for v in finished.values())


def test_one_name_cannot_be_two_kinds_of_metric():
    with pytest.raises(AssertionError, match="'a' is Mean here, Max there"):
        combine_metrics([{"a": Mean(1.0, 1.0)}, {"a": Max(torch.tensor(1.0))}])
