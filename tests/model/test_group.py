import pytest
import torch

from local_tinker.model.group import ProjectionGroup, padded, stacked
from local_tinker.model.linear import FrozenLinear
from local_tinker.model.lora import LoraDropout

F64 = torch.float64


def group(quantize=None, sizes=(128, 64, 64), *, dtype=F64, device="cpu", bias=True):
    generator = torch.Generator().manual_seed(0)
    linears = tuple(
        FrozenLinear(
            (torch.randn(o, 64, dtype=F64, generator=generator) * 0.1).to(device, dtype),
            torch.randn(o, dtype=F64, generator=generator).to(device, dtype) if bias and i != 1 else None,
            quantize=quantize,
            dtype=dtype,
            path=str(i),
        )
        for i, o in enumerate(sizes)
    )
    return ProjectionGroup(tuple(str(i) for i in range(len(sizes))), linears)


def random_pairs(made, members=None, *, rank=4, dtype=F64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=generator).to(device, dtype)  # noqa: E731
    return {
        path: (draw(rank, 64), draw(linear.out_features, rank) * 0.1)
        for i, (path, linear) in enumerate(zip(made.paths, made.linears, strict=True))
        if members is None or i in members
    }


def through(made, x, pairs, dy, *, scale=0.7, dropout=None):
    """The group's value, input gradient and adapter gradients."""
    lora = made.lora(pairs, scale, dropout)
    room = made.room(x, lora)
    room[:, :64].copy_(x)
    y, thin = made.forward(room, lora)
    sink = {path: tuple(torch.zeros(t.shape, dtype=F64, device=x.device) for t in pair) for path, pair in pairs.items()}
    dx, q = made.backward_input(dy, lora)
    for thin_product in (thin, None):  # kept or computed again
        made.backward_adapter(q, dy, x, thin_product, lora, sink)
    return [y, dx, *(t / 2 for pair in sink.values() for t in pair)]


def by_autograd(made, x, pairs, dy, *, scale=0.7, dropout=None):
    x, dy = x.to(F64).requires_grad_(), dy.to(F64)
    pairs = {path: tuple(t.to(F64).requires_grad_() for t in pair) for path, pair in pairs.items()}
    outputs = []
    for path, linear in zip(made.paths, made.linears, strict=True):
        y = x @ linear.dense().to(F64).t() + (0.0 if linear.bias is None else linear.bias.to(F64))
        if path in pairs:
            a, b = pairs[path]
            y = y + scale * ((x if dropout is None else dropout(x, path)) @ a.t()) @ b.t()
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    leaves = [x, *(t for pair in pairs.values() for t in pair)]
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("sizes", [(128,), (128, 64), (128, 64, 64)])
@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_a_group_equals_its_projections_one_by_one_in_value_and_gradient(quantize, sizes, held):
    made = group(quantize, sizes)
    if held:
        made.hold(4 * len(sizes))
    pairs = random_pairs(made, None if len(sizes) < 3 else (0, 2))
    x, dy = torch.randn(7, 64, dtype=F64), torch.randn(7, sum(sizes), dtype=F64)
    for ours, theirs in zip(through(made, x, pairs, dy), by_autograd(made, x, pairs, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_masks_each_members_own_input_forward_and_backward():
    made, x, dy = group(), torch.randn(6, 64, dtype=F64), torch.randn(6, 256, dtype=F64)
    pairs, dropout = random_pairs(made), LoraDropout(0.5, seeds=(9, 4), lengths=(2, 4))
    found = through(made, x, pairs, dy, dropout=dropout)
    for ours, theirs in zip(found, by_autograd(made, x, pairs, dy, dropout=dropout), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[0], through(made, x, pairs, dy)[0])


def test_a_group_without_adapters_is_the_base_and_gives_the_inputs_gradient():
    made, x, dy = group("4bit"), torch.randn(5, 64, dtype=F64), torch.randn(5, 256, dtype=F64)
    lora = made.lora({}, 1.0)
    y, thin = made.forward(made.room(x, lora).copy_(x), lora)
    dx, q = made.backward_input(dy, lora)
    assert lora is thin is q is None
    for ours, theirs in zip((y, dx), by_autograd(made, x, {}, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert made.backward_input(dy, lora, need=False) == (None, None)


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
@pytest.mark.parametrize("sizes", [(128,), (128, 64, 64)])
def test_residency_changes_no_bit_and_every_member_sees_it(quantize, sizes):
    made = group(quantize, sizes, dtype=torch.bfloat16)
    before = [linear.dense().clone() for linear in made.linears]
    digest = [linear.digest() for linear in made.linears]
    made.hold(8)
    first = made._resident.data_ptr()
    made.hold(4)  # room enough: nothing happens
    assert made.held and made._resident.data_ptr() == first
    made.hold(40)
    for linear, dense, sha in zip(made.linears, before, digest, strict=True):
        assert torch.equal(linear.dense(), dense) and linear.digest() == sha
        assert linear.dense().untyped_storage().data_ptr() == made._resident.untyped_storage().data_ptr()
    assert torch.equal(made.dense(), torch.cat(before))
    made.release()
    assert not made.held and torch.equal(made.dense(), torch.cat(before))


def test_a_dense_base_is_never_held_twice():
    made = group(None)
    made.hold(8)
    for linear in made.linears:
        assert linear.store.stored.untyped_storage().data_ptr() == made._resident.untyped_storage().data_ptr()
        assert linear.weight.data_ptr() == linear.store.stored.data_ptr()


def test_matrices_that_lie_on_top_of_each_other_are_stacked_without_a_copy():
    flat = torch.arange(24.0)
    parts = [flat[:8].view(2, 4), flat[8:20].view(3, 4)]
    view = stacked(parts)
    assert torch.equal(view, torch.cat(parts)) and view.data_ptr() == flat.data_ptr()
    apart = stacked([parts[0], flat[12:24].view(3, 4)])
    assert torch.equal(apart, torch.cat([parts[0], flat[12:24].view(3, 4)]))


def test_widths_are_rounded_up_to_eight():
    assert [padded(w) for w in (0, 1, 8, 9, 96)] == [0, 8, 8, 16, 96]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("sizes", [(128,), (128, 64), (128, 64, 64)])
def test_on_a_card_the_fused_form_is_as_near_to_fp64_as_separate_products(sizes, held, rank):
    made = group("4bit", sizes, dtype=torch.bfloat16, device="cuda")
    if held:
        made.hold(rank * len(sizes))
    pairs = random_pairs(made, rank=rank, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(77, 64, device="cuda").bfloat16()
    dy = torch.randn(77, sum(sizes), device="cuda").bfloat16()
    assert made.fused(made.lora(pairs, 0.7))
    for ours, exact in zip(through(made, x, pairs, dy), by_autograd(made, x, pairs, dy), strict=True):
        exact = exact.detach()
        assert float((ours.to(F64) - exact).norm() / exact.norm()) < 6e-3


@pytest.mark.parametrize("sizes", [(128,), (128, 64, 64)])
def test_an_adapter_is_laid_beside_held_weights_once_until_something_else_stands_there(sizes, monkeypatch):
    monkeypatch.setattr(ProjectionGroup, "fusable", True)
    made = group("4bit", sizes, dtype=torch.bfloat16)
    first, second = (
        made.lora({p: (a + i, b + i) for p, (a, b) in random_pairs(made, dtype=torch.bfloat16).items()}, 0.7)
        for i in range(2)
    )
    written, put = [], made._put_adapter
    monkeypatch.setattr(made, "_put_adapter", lambda lora, buffer: (written.append(lora), put(lora, buffer))[1])

    def ask(lora):
        """Whether it was laid there anew; it stands there in any case."""
        before = len(written)
        wide = made._with_adapter(lora)
        if made.single:
            assert torch.equal(wide[128 : 128 + lora.rank], lora.a)
        else:
            assert torch.equal(wide[128:192, 64 + lora.rank : 64 + 2 * lora.rank], lora.bs[1] * 0.7)
        return len(written) > before

    assert ask(first) and ask(first)  # nothing is held: every product has a buffer of its own
    made.hold(first.width)
    assert [ask(first), ask(first), ask(second), ask(first), ask(first)] == [True, False, True, True, False]
    if made.single:  # decoding lays its adapter below
        made.with_below(4)[128:].zero_()
        made.below = 12345
        assert ask(first) and not ask(first)
    made.hold(first.width + 128)  # a larger buffer
    assert ask(first) and not ask(first)
    made.release()
    assert ask(first)
    made.hold(first.width)
    assert ask(second)
    del second, written[:]
    assert made._ridden() is None  # no adapter is kept alive by where it stood
