import pytest
import torch

from local_tinker.model.lora import LoraDropout, gradient_leaf

F64 = torch.float64


def test_a_leafs_gradient_is_added_where_it_was_told_and_nowhere_else():
    tensor, into = torch.tensor([2.0, 3.0], dtype=F64), torch.tensor([1.0, 1.0], dtype=F64)
    leaf = gradient_leaf(tensor, into)
    (leaf * leaf).sum().backward()
    assert torch.equal(into, torch.tensor([5.0, 7.0], dtype=F64)) and leaf.grad is None


def test_dropout_is_replayed_by_its_seeds_and_differs_between_projections_and_documents():
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


def test_dropout_keeps_the_expected_share_and_the_mean():
    x = torch.ones(400, 64, dtype=F64)
    y = LoraDropout(0.25, seeds=(1,), lengths=(400,))(x, "p")
    assert float((y == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
