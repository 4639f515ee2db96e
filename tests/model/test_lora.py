import pytest
import torch

from local_tinker.model.linear import FrozenLinear
from local_tinker.model.lora import LoraDropout, project

F64 = torch.float64


def group(quantize, count=3):
    torch.manual_seed(0)
    linears = [
        FrozenLinear(
            torch.randn(128, 64, dtype=F64) * 0.1,
            torch.randn(128, dtype=F64),
            quantize=quantize,
            dtype=F64,
            path=str(i),
        )
        for i in range(count)
    ]
    pairs = [
        (torch.randn(4, 64, dtype=F64, requires_grad=True), torch.randn(128, 4, dtype=F64, requires_grad=True))
        for _ in linears
    ]
    return linears, pairs


def plain(x, linears, pairs, scale):
    outputs = []
    for linear, pair in zip(linears, pairs, strict=True):
        y = x @ linear.dense().t() + linear.bias
        outputs.append(y if pair is None else y + scale * (x @ pair[0].t()) @ pair[1].t())
    return outputs


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_a_group_equals_its_projections_one_by_one_in_value_and_gradient(quantize):
    linears, pairs = group(quantize)
    pairs[1] = None
    x = torch.randn(7, 64, dtype=F64, requires_grad=True)
    ours, reference = project(x, linears, pairs, 0.7), plain(x, linears, pairs, 0.7)
    directions = [torch.randn_like(y) for y in reference]
    leaves = [x, *pairs[0], *pairs[2]]
    got = torch.autograd.grad(ours, leaves, directions)
    want = torch.autograd.grad(reference, leaves, directions)
    for a, b in zip([*ours, *got], [*reference, *want], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_scale_zero_gives_the_bits_of_the_base_alone():
    linears, pairs = group("4bit")
    x = torch.randn(5, 64, dtype=F64)
    for a, b in zip(project(x, linears, pairs, 0.0), project(x, linears, [None] * 3, 1.0), strict=True):
        assert torch.equal(a, b)


def test_dropout_is_replayed_by_its_seeds_and_differs_between_projections_and_documents():
    linears, pairs = group(None)
    x = torch.ones(6, 64, dtype=F64)
    drop = LoraDropout(0.5, seeds=(9, 4), lengths=(2, 4))
    state = torch.random.get_rng_state()
    assert torch.equal(drop(x, "a"), drop(x, "a"))
    assert not torch.equal(drop(x, "a"), drop(x, "b"))
    assert not torch.equal(drop(x, "a"), LoraDropout(0.5, seeds=(10, 4), lengths=(2, 4))(x, "a"))
    assert torch.equal(torch.random.get_rng_state(), state)
    swapped = LoraDropout(0.5, seeds=(4, 9), lengths=(4, 2))(x, "a")
    assert torch.equal(drop(x, "a"), torch.cat([swapped[4:], swapped[:4]]))
    assert torch.equal(drop(x, "a")[2:], drop.document(1)(x[2:], "a"))
    first = project(x, linears, pairs, 0.7, dropout=drop)[0]
    a, b = pairs[0]
    assert torch.allclose(first, x @ linears[0].dense().t() + linears[0].bias + 0.7 * (drop(x, "0") @ a.t()) @ b.t())


def test_dropout_keeps_the_expected_share_and_the_mean():
    x = torch.ones(400, 64, dtype=F64)
    y = LoraDropout(0.25, seeds=(1,), lengths=(400,))(x, "p")
    assert float((y == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
