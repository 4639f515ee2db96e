"""Products that only a card computes, against the definition beside them."""

import pytest
import torch

from local_tinker.hardware import fp8_fault
from local_tinker.model.group import ProjectionGroup
from local_tinker.model.kernels import fp8, nf4, nf4_rows
from local_tinker.model.linear import FrozenLinear, NF4Weight
from local_tinker.model.stacked import Stacked, slices_for
from tests.model.kernels.training_checks import HALF, draw, near

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9, nf4_rows.MOST_ROWS])
@pytest.mark.parametrize(
    ("rows", "inputs"), [((96,), 128), ((43,), 64 * 7), ((72, 24), 64 * 17), ((40, 8, 24), 64 * 7), ((4096,) * 3, 3072)]
)
@pytest.mark.parametrize("more", [False, True])
def test_a_product_with_nf4_rounds_weights_as_dequantising_does_and_sums_once(count, rows, inputs, more, dtype):
    stored = [NF4Weight(draw(o, inputs, seed=at, scale=0.02 * 4**at, dtype=dtype)) for at, o in enumerate(rows)]
    packed = nf4.Packed([(one.stored, one.state) for one in stored])
    x, bias = draw(count, inputs, seed=5, dtype=dtype), draw(sum(rows), seed=6, dtype=dtype) if more else None
    below = draw(18, inputs + 8, seed=7, dtype=dtype)[:, :inputs] if more else None
    assert packed.multiplies(x) and not packed.multiplies(draw(nf4_rows.MOST_ROWS + 1, inputs))
    weights = torch.cat([one.dense(dtype) for one in stored])
    expected = nf4_rows.nf4_rows_reference(x, weights, bias, below)
    found = packed.multiply(x, bias, below)
    assert found.shape == expected.shape and found.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    assert bool(((found.double() - expected).abs() <= expected.abs() * rounding + 1e-3 * expected.std()).all())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("inputs", "tolerance"), [(320, 6e-3), (14336, 1.2e-2)]
)  # the cores keep fewer bits of long sums
def test_products_in_eight_bits_equal_the_definition(inputs, tolerance, biased):
    if (reason := fp8_fault(torch.cuda.get_device_capability())) is not None:
        pytest.skip(reason)
    x, w = fp8.quantise_rows(draw(33, inputs)), fp8.quantise_rows(draw(48, inputs, seed=1))
    bias = draw(48, seed=2) if biased else None
    near(fp8.product(x, w, bias, HALF), fp8.product_reference(x, w, bias, HALF), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("count", "inputs", "outputs"), [(1, 512, 384), (16, 512, 384), (200, 1024, 384), (64, 1024, 384)]
)
def test_a_projection_by_slices_of_its_inputs_rounds_as_one_product_does(count, inputs, outputs, dtype):
    linear = FrozenLinear(draw(outputs, inputs, scale=0.05, dtype=dtype), None, quantize=None, dtype=dtype, path="p")
    stacked, x = Stacked(ProjectionGroup(("p",), (linear,))), draw(count, inputs, seed=1, dtype=dtype)
    a, b = draw(20, inputs, seed=2, scale=0.05, dtype=dtype), draw(outputs, 20, seed=3, dtype=dtype)
    stacked.prepare(20)
    for to, source in stacked.bind([(a, b)], 0.5):
        to.copy_(source)
    assert slices_for(count, inputs, outputs) and stacked._slices(x)
    y = (x.double() @ linear.dense().double().t()).to(dtype).double()
    expected = y + 0.5 * (x.double() @ a.double().t()).to(dtype).double() @ b.double().t()
    found = stacked.adapted(x)
    assert found.shape == (count, outputs) and found.dtype == dtype
    # a sum in fp32 may round to the neighbour, of y and of A x
    allowed = torch.finfo(dtype).eps * (expected.abs() + y.abs() + expected.std())
    assert bool(((found.double() - expected).abs() <= allowed).all())
