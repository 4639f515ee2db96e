"""Groups whose base products are of 8-bit floats, on the definition that a CPU computes."""

import pytest
import torch

from local_tinker.hardware import fp8_fault
from local_tinker.model.eight_bit import EightBitGroup
from local_tinker.model.kernels import fp8
from tests.model.test_group import F64, by_autograd, group, random_pairs, through


def eight(quantize="4bit", sizes=(128, 64, 64)):
    made = group(quantize, sizes, dtype=torch.float32)
    return EightBitGroup(made.paths, made.linears)


def stands_for(rows):
    return rows.values.double() * rows.scales.double()


def gap(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_the_largest_of_a_row_is_kept_and_the_rest_to_a_sixteenth():
    x = torch.randn(5, 300) * torch.tensor([1e-6, 1.0, 1e4, 1.0, 0.0])[:, None]
    rows = fp8.quantise_rows(x)
    largest = x.abs().amax(1)
    torch.testing.assert_close(stands_for(rows).abs().amax(1).float(), largest, rtol=1e-6, atol=0)
    normal = x.abs() > largest[:, None] * 2**-14
    assert bool(((stands_for(rows) - x).abs()[normal] <= x.abs()[normal] / 16).all()) and not stands_for(rows)[4].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.randn(2, 64)
    x[1, 3] = bad
    y = fp8.product(fp8.quantise_rows(x), fp8.quantise_rows(torch.randn(16, 64)), None, torch.float32)
    assert bool(y[0].isfinite().all()) and not bool(y[1].isfinite().any())


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
@pytest.mark.parametrize("sizes", [(128,), (128, 64, 64)])
def test_the_base_is_rounded_along_the_sum_and_the_adapter_is_not(quantize, sizes):
    made, outputs = eight(quantize, sizes), sum(sizes)
    pairs = random_pairs(made, dtype=torch.float32)
    x, dy = torch.randn(9, 64), torch.randn(9, outputs)
    found = through(made, x, pairs, dy)
    exact = by_autograd(made, x, pairs, dy)
    base = stands_for(fp8.quantise_rows(x)) @ stands_for(fp8.quantise_rows(made.dense())).t()
    back = stands_for(fp8.quantise_rows(dy)) @ stands_for(fp8.quantise_rows(made.dense().t().contiguous())).t()
    plain = by_autograd(made, x, {}, dy)
    expected = [exact[0] - plain[0] + base + made.bias.double(), exact[1] - plain[1] + back, *exact[2:]]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.to(F64), theirs, rtol=2e-5, atol=2e-5)
    assert 1e-3 < gap(found[0] - (exact[0] - plain[0]), plain[0]) < 0.06 and 1e-3 < gap(found[1], exact[1]) < 0.06


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_residency_changes_no_bit_and_leaves_the_dense_weights_alone(quantize):
    made = eight(quantize)
    x, dy, pairs = torch.randn(9, 64), torch.randn(9, 256), random_pairs(made, dtype=torch.float32)
    before = through(made, x, pairs, dy)
    assert made.rebuilt and made.held_bytes == 0
    made.hold(12)
    made.hold(40)
    assert made.held and not made.rebuilt and made.held_bytes == 2 * 64 * 256
    for ours, theirs in zip(through(made, x, pairs, dy), before, strict=True):
        assert torch.equal(ours, theirs)
    assert not any(linear.held for linear in made.linears)
    made.release()
    assert not made.held


def test_older_cards_are_named():
    assert "8.9" in fp8_fault((8, 6)) and fp8_fault((8, 9)) is fp8_fault((9, 0)) is fp8_fault(None) is None
