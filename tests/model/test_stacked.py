import pytest
import torch
from torch.nn import functional as F

from local_tinker.model.decode import DecodeRoad
from local_tinker.model.group import ProjectionGroup
from local_tinker.model.linear import FrozenLinear
from local_tinker.model.stacked import Stacked, slices_for
from tests.sampler.test_greedy import fast

SCALE = 0.5


def group(*outputs, quantize=None, seed=0, biased=True):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o, 64, generator=generator) for o in outputs]
    biases = [torch.randn(o, generator=generator) if biased and i % 2 == 0 else None for i, o in enumerate(outputs)]
    linears = tuple(
        FrozenLinear(w, b, quantize=quantize, dtype=torch.float32, path=f"p{i}")
        for i, (w, b) in enumerate(zip(weights, biases, strict=True))
    )
    return ProjectionGroup(tuple(f"p{i}" for i in range(len(outputs))), linears)


def pair(outputs, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 64, generator=generator), torch.randn(outputs, rank, generator=generator)


def bound(stacked, pairs):
    stacked.prepare(max((p[0].shape[0] for p in pairs if p is not None), default=0))
    for to, source in stacked.bind(pairs, SCALE):
        to.copy_(source)


def check(stacked, pairs, x):
    y, low = stacked.product(x)
    y = y[:, : stacked.outputs].clone()
    if low is not None:
        y = low.add_to(y)
    expected = []
    for linear, adapter in zip(stacked.group.linears, pairs, strict=True):
        out = torch.nn.functional.linear(x, linear.dense(), linear.bias)
        expected.append(out if adapter is None else out + SCALE * (x @ adapter[0].t()) @ adapter[1].t())
    torch.testing.assert_close(y, torch.cat(expected, 1), atol=2e-4, rtol=1e-4)


def test_one_product_gives_every_part_with_its_adapter_and_weights_stay_one_copy():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(9))
    for outputs in ((12,), (12, 8, 8)):
        stacked = Stacked(group(*outputs))
        for ranks in ((3,) * len(outputs), (20, None, 20)[: len(outputs)], (None,) * len(outputs)):
            pairs = [None if r is None else pair(o, r, seed=o + r) for o, r in zip(outputs, ranks, strict=True)]
            bound(stacked, pairs)
            check(stacked, pairs, x)
        storages = {linear.dense().untyped_storage().data_ptr() for linear in stacked.group.linears}
        assert len(storages) == 1


def test_many_rows_are_multiplied_by_whole_tiles_whose_spare_rows_count_for_nothing(monkeypatch):
    monkeypatch.setattr(ProjectionGroup, "fusable", True)  # as on a card
    seen = []
    monkeypatch.setattr(
        "local_tinker.model.stacked.project", lambda x, w, b: seen.append(w.shape[0]) or F.linear(x, w, b)
    )
    stacked = Stacked(group(120))
    bound(stacked, [pair(120, 4, seed=1)])
    stacked.group.with_below(stacked.group.spare_rows)[136:] = torch.nan
    for rows in (128, 129):
        check(stacked, [pair(120, 4, seed=1)], torch.randn(rows, 64, generator=torch.Generator().manual_seed(9)))
    assert seen == [120 + 16, 256]


@pytest.mark.parametrize("slices", [2, 4])
def test_a_product_by_slices_of_the_inputs_is_the_product(slices, monkeypatch):
    stacked = Stacked(group(120, biased=False))
    bound(stacked, [pair(120, 3, seed=5)])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9))
    expected = stacked.adapted(x)
    asked = []
    monkeypatch.setattr(Stacked, "_slices", lambda self, x: asked.append(x) or slices)
    torch.testing.assert_close(stacked.adapted(x), expected, atol=2e-4, rtol=1e-4)
    assert asked


def test_products_with_few_rows_or_few_outputs_go_by_slices():
    assert slices_for(1, 3072, 3072) == slices_for(16, 3072, 3072) == 2
    assert slices_for(17, 3072, 3072) == 0
    assert slices_for(256, 8192, 3072) == slices_for(192, 8192, 2048) == 2
    assert slices_for(256, 8192, 2048) == 0
    assert slices_for(1, 3080, 3072) == 0  # its parts would not begin where cuBLAS reads 16 bytes at once


def test_recorded_steps_are_stale_when_the_bias_or_the_pitch_of_the_weights_is_another():
    stacked = Stacked(group(12, 8))
    bound(stacked, [pair(12, 4, seed=1), None])
    seen = {stacked.address}
    stacked._bias = stacked._bias.clone()
    seen.add(stacked.address)
    held = stacked.group._resident
    stacked.group._resident = held.as_strided((held.shape[0] // 2, held.shape[1]), (2 * held.shape[1], 1))
    seen.add(stacked.address)
    assert len(seen) == 3


def test_a_quantised_base_that_is_not_held_is_multiplied_as_it_is():
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(9))
    stacked = Stacked(group(64, 64, quantize="4bit"))
    pairs = [pair(64, 4, seed=1), None]
    bound(stacked, pairs)
    assert not stacked.held
    check(stacked, pairs, x)
    stacked.group.hold()
    assert not stacked.current
    bound(stacked, pairs)
    assert stacked.held and stacked.current
    check(stacked, pairs, x)


def test_what_training_does_to_the_buffer_is_noticed():
    stacked = Stacked(group(12))
    bound(stacked, [pair(12, 4, seed=1)])
    assert stacked.current
    stacked.group.below = 1  # a pass of another adapter wrote there
    assert not stacked.current
    bound(stacked, [pair(12, 4, seed=1)])
    assert stacked.current
    stacked.group.release()
    assert not stacked.current


def test_a_step_keeps_its_version_between_adapters_of_one_shape_and_changes_it_with_the_shape():
    _, road, _, frozen = fast("llama")
    from tests.model.families import random_pairs

    decode = DecodeRoad(road)
    versions = []
    for rank, scale in ((4, 0.3), (4, 0.3), (4, 0.5), (20, 0.5), (20, 0.5)):
        decode.bind(random_pairs(frozen, rank=rank, seed=len(versions)), scale)
        versions.append(decode.version)
    assert versions[0] == versions[1] < versions[2] < versions[3] == versions[4]


def test_any_number_of_rows_is_multiplied_with_biases_and_adapters():
    for rows in (3, 4, 17):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(9))
        stacked = Stacked(group(12, 8, 8))
        for adapter in ([pair(12, 3, seed=1), None, pair(8, 20, seed=2)], [None] * 3):
            bound(stacked, adapter)
            check(stacked, adapter, x)


def test_few_rows_are_multiplied_from_the_four_bits_even_beside_the_dense_weights():
    """On a card the kernel says which rows it takes; here a stand-in computes what it would."""
    x, taken = torch.randn(5, 64, generator=torch.Generator().manual_seed(9)), []

    class FromFourBits:
        def multiplies(self, rows):
            return rows.shape[0] <= 4

        def multiply(self, rows, bias, below):
            taken.append(rows.shape[0])
            dense = torch.cat([linear.dense() for linear in made.linears])
            return torch.cat([rows @ dense.t() + bias, rows @ below.t()], 1)

    for held in (False, True):
        made = group(64, 64, quantize="4bit")
        stacked, pairs = Stacked(made), [pair(64, 3, 1), pair(64, 5, 2)]
        if held:
            made.hold(64)
        made.packed = FromFourBits()
        bound(stacked, pairs)
        for rows in (x[:1], x[:4], x):
            check(stacked, pairs, rows)
    assert taken == [1, 4, 1, 4]


def test_four_bit_products_without_a_compiler_are_named(monkeypatch):
    monkeypatch.setattr("local_tinker.model.decode.triton_ready", lambda kind: True)
    monkeypatch.setattr("local_tinker.model.decode.rows_fault", lambda device: "no compiler")
    monkeypatch.setattr("local_tinker.model.decode.power_of_two", lambda n, least: n)
    _, road, _, _ = fast("llama")
    assert DecodeRoad(road).unfused() == []
    for layer in road.weights.layers:
        for part in layer.groups:
            part.packed = object()
    assert DecodeRoad(road).unfused() == ["products of few rows with four-bit weights (no compiler)"]
