"""Every training kernel against the definition beside it: on a card (tests/gpu), or on a CPU through Triton's interpreter
in a process of its own (test_interpreted.py)."""

import os
from itertools import pairwise

import pytest
import torch

from local_tinker.model.attention import VarlenCausal, attend_reference, attention_kernel
from local_tinker.model.kernels import (
    fp8,
    head,
    lora,
    nf4,
    norm,
    packed_blocks,
    rope,
    serves,
    swiglu,
    triton,
)
from local_tinker.model.kernels.rope import HeadLayout
from local_tinker.model.linear import NF4Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter truncates to bf16 instead of rounding
pytestmark = pytest.mark.skipif(
    triton is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton with a card or its interpreter",
)


def draw(*shape, seed=0, dtype=HALF, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def near(ours, theirs, tolerance=4e-3):
    """Half precision may round the other way here and there; most entries are equal to the bit."""
    ours, theirs = ours.double(), theirs.double()
    gap = float((ours - theirs).norm() / theirs.norm())
    assert gap < tolerance, f"relative difference {gap:.3g}"


def test_the_kernels_are_what_runs_here():
    assert serves(draw(2, 2)) and not serves(draw(2, 2, dtype=torch.float32))


@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize("add", [False, True])
def test_norm_with_the_sum_before_it(kind, add):
    h, weight = draw(5, 70), draw(70, seed=2)
    y = draw(5, 90, seed=1)[:, :70] if add else None  # rows of something wider
    out, expected = draw(5, 80)[:, :70], draw(5, 70)
    total = norm.add_norm(h, y, weight, 1e-5, kind, out=out)
    assert torch.equal(total, norm.add_norm_reference(h, y, weight, 1e-5, kind, expected))
    near(out, expected)


@pytest.mark.parametrize("kind", norm.KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_norm_backward_in_place_over_its_inputs(kind, residual):
    h, weight, dx, dh = draw(5, 70), draw(70, seed=2), draw(5, 80, seed=3)[:, :70], draw(5, 78, seed=4)[:, :70]
    out, again = torch.empty_like(h), torch.empty_like(h)
    before = dh.clone() if residual else None
    norm.norm_backward_reference(dx.clone(), h, weight, 1e-5, kind, before, out, again)
    norm.norm_backward(dx, h, weight, 1e-5, kind, residual=dh if residual else None, out=dh, again=dx)
    near(dh, out)
    near(dx, again)


LAYOUTS = {
    "plain": HeadLayout(6, 2, 16),
    "odd": HeadLayout(3, 1, 24),
    "normed": HeadLayout(4, 2, 16, "round_then_scale", 1e-6, True, draw(16, seed=8), draw(16, seed=9)),
    "one_plus": HeadLayout(4, 4, 16, "one_plus", 1e-6, True, draw(16, seed=8), draw(16, seed=9)),
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rotation_of_q_and_k_and_back(name, wide):
    layout = LAYOUTS[name]
    count, pairs = 5, layout.head_dim // 2
    angles = tuple(
        t.to(torch.float32 if wide else HALF)[:, None] for t in (draw(count, pairs).sin(), draw(count, pairs).cos())
    )
    raw = draw(count, sum(layout.sizes) + 8, seed=1)[:, : sum(layout.sizes)]
    expected = torch.empty(count, sum(layout.sizes), dtype=HALF, device=DEVICE)
    rope.rotate_qk_reference(raw.clone(), layout, angles, expected)
    kept = raw.clone()
    rotated = rope.rotate_qk(raw, layout, angles)
    near(rotated, expected)
    assert (rotated.data_ptr() == raw.data_ptr()) == (layout.q_norm is None)
    ours = draw(count, sum(layout.sizes), seed=5)
    theirs = ours.clone()
    rope.rotate_back_reference(theirs, kept, layout, angles)
    rope.rotate_back_(ours, kept, layout, angles)
    near(ours, theirs, 6e-3)


@pytest.mark.parametrize("activation", swiglu.ACTIVATIONS)
def test_gated_activation_and_its_backward_in_place(activation):
    gate_up, dy = draw(3, 2 * 1100 + 8)[:, :2200], draw(3, 1100, seed=1)
    expected = torch.empty(3, 1100, dtype=HALF, device=DEVICE)
    swiglu.gated_reference(gate_up, activation, expected)
    near(swiglu.gated(gate_up, activation), expected)
    theirs, product = gate_up.clone(), dy.clone()
    swiglu.gated_backward_reference(theirs, product, activation)
    swiglu.gated_backward_(gate_up, dy, activation)
    near(gate_up, theirs, 6e-3)
    near(dy, product)
    near(dy, expected)


@pytest.mark.parametrize(("rows", "inputs"), [((96,), 128), ((40,), 64 * 7), ((72, 24), 128), ((40, 8, 24), 64 * 7)])
def test_nf4_has_the_bits_of_bitsandbytes(rows, inputs):
    stored = [NF4Weight(draw(count, inputs, seed=at, scale=0.02 * 4**at)) for at, count in enumerate(rows)]
    parts, want = [(one.stored, one.state) for one in stored], torch.cat([one.dense(HALF) for one in stored])
    out = torch.full((sum(rows) + 1, inputs + 16), 7.0, dtype=HALF, device=DEVICE)
    nf4.Packed(parts).dense_into(out[: sum(rows), :inputs])
    assert torch.equal(out[:-1, :inputs], want)
    assert bool((out[:, inputs:] == 7.0).all()) and bool((out[-1] == 7.0).all())
    for part, dense in zip(parts, want.split(list(rows)), strict=True):
        expected = torch.empty_like(dense)
        nf4.nf4_dense_reference(*part, expected)
        assert torch.equal(expected, dense)


def test_rows_in_eight_bits_have_the_bits_of_the_definition():
    x = torch.cat([draw(4, 5000), draw(1, 5000, scale=1e3), torch.zeros(1, 5000, dtype=HALF, device=DEVICE)])
    x[0, 7] = 300.0
    wide = draw(6, 5008)
    wide[:, :5000] = x
    ours, theirs = fp8.quantise_rows(wide[:, :5000]), fp8.quantise_rows_reference(x)
    assert torch.equal(ours.scales, theirs.scales) and ours.values.dtype == torch.float8_e4m3fn
    found, expected = ours.values.float(), theirs.values.float()
    same = found == expected
    if INTERPRETED:  # Triton's rounds ties up, and loses the carry where a mantissa rounds to the next power of two
        assert float(same.float().mean()) > 0.95
        same = ((found - expected).abs() <= expected.abs().clamp(min=2**-6) / 8) | (expected.abs().log2() % 1 == 0)
    assert bool(same.all()) and float(found.abs().max()) == 448.0


@pytest.mark.parametrize("members", [((0, 70),), ((0, 40), (56, 14)), ((0, 30), (30, 20), (50, 20))])
@pytest.mark.parametrize("rank", [3, 16])
def test_adapter_columns_are_block_diagonal(members, rank):
    width = -(-rank * len(members) // 8) * 8
    blocks = [(draw(rows, rank, seed=start), start) for start, rows in members]
    ours, theirs = (torch.full((70, width + 5), 3.0, dtype=HALF, device=DEVICE) for _ in range(2))
    lora.block_diagonal(blocks, 0.7, ours[:, :width])
    lora.block_diagonal_reference(blocks, 0.7, theirs[:, :width])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("members", [((0, 70),), ((0, 40), (56, 14)), ((0, 30), (30, 20), (50, 20))])
@pytest.mark.parametrize("rank", [3, 16])
def test_blocks_on_the_diagonal_are_added_to_their_members(members, rank):
    wide = draw(70, rank * len(members) + 3, dtype=torch.float32)[:, : rank * len(members)]
    ours, theirs = (
        [(torch.full((rows, rank), 0.5, device=DEVICE), start) for start, rows in members] for _ in range(2)
    )
    lora.add_diagonal(wide, ours, 0.7)
    lora.add_diagonal_reference(wide, theirs, 0.7)
    for (mine, _), (expected, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
        assert not bool((mine == 0.5).all())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab", [50, 4500])
def test_rows_of_logits(vocab, softcap):
    z, y = draw(4, vocab, dtype=torch.float32, scale=3.0), torch.tensor([0, 7, 49, vocab - 1], device=DEVICE)
    found = []
    for rows in (head.logit_rows, lambda z, y, **o: head.logit_rows_reference(z, y, *o.values())):
        logprobs, entropy = torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)
        grad = torch.zeros(4, vocab, device=DEVICE)
        rows(z, y, scale=0.5, softcap=softcap, logprobs=logprobs, entropy=entropy, grad=grad)
        found.append((logprobs, entropy, grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    over, spent = torch.zeros(4, device=DEVICE), z.clone()
    half = head.half_over(spent, HALF)
    head.logit_rows(spent, y, scale=0.5, softcap=softcap, logprobs=over, entropy=None, grad=half)
    assert half.data_ptr() == spent.data_ptr() and torch.equal(half, found[0][2].to(HALF))
    alone = torch.zeros(4, device=DEVICE)
    head.logit_rows(z, y, scale=0.5, softcap=softcap, logprobs=alone, entropy=None, grad=None)
    assert torch.equal(alone, found[0][0])


@pytest.mark.parametrize("case", ["grouped", "window", "cap", "narrow", "one head"])
def test_attention_over_packed_documents_and_its_gradients(case):
    heads, kv_heads, d = {"one head": (1, 1, 32), "narrow": (2, 1, 24)}.get(case, (2, 1, 16))
    window, softcap = (37 if case == "window" else None), (4.0 if case == "cap" else None)
    edges = [0, 1, 40, 111] if case == "grouped" else [0, 20, 90]
    n, options = edges[-1], dict(scale=0.4, window=window, softcap=softcap)
    wide = draw(n, (heads + 2 * kv_heads) * d)
    parts = [t.unflatten(-1, (-1, d)) for t in wide.split([heads * d, kv_heads * d, kv_heads * d], dim=-1)]
    attend, dout = VarlenCausal(edges, DEVICE), draw(n, heads, d, seed=1)
    assert attention_kernel(wide.device, HALF, d, softcap) == "packed"
    out, kept = attend.forward(*parts, **options)
    found = torch.full_like(wide, 7.0)
    into = tuple(t.unflatten(-1, (-1, d)) for t in found.split([heads * d, kv_heads * d, kv_heads * d], dim=-1))
    attend.backward(dout, *parts, out, kept, **options, into=into)
    exact = [t.double().cpu().requires_grad_() for t in parts]
    expected = attend_reference(*exact, edges, **options)
    gradients = torch.autograd.grad(expected, exact, dout.double().cpu())
    near(out.cpu(), expected.detach())
    for ours, theirs in zip(into, gradients, strict=True):
        near(ours.cpu(), theirs, 8e-3)
    leaves = [t.detach().clone().requires_grad_() for t in parts]  # the same through autograd
    attend(0, *leaves, **options).backward(dout)
    assert all(torch.equal(leaf.grad, t) for leaf, t in zip(leaves, into, strict=True))


def whole(parts, edges, prefixes):
    """Packed parts with every prefix repeated before each document that goes on from it: rows, edges, rows that count."""
    rows, ends, own = [], [0], []
    for (start, stop), prefix in zip(pairwise(edges), prefixes, strict=True):
        before = [] if prefix is None else list(range(edges[prefix], edges[prefix + 1]))
        own += range(len(rows) + len(before), len(rows) + len(before) + stop - start)
        rows += [*before, *range(start, stop)]
        ends.append(len(rows))
    return [part[rows] for part in parts], ends, own


@pytest.mark.parametrize("case", ["grouped", "window", "cap", "wide window"])
@pytest.mark.parametrize(("prefix", "walked"), [(1, 1024), (64, 40), (75, 17)])
def test_attention_of_documents_that_go_on_from_a_prefix(monkeypatch, case, prefix, walked):
    """A whole document, then a prefix with three documents behind it, then one with a single one behind it."""
    monkeypatch.setattr(packed_blocks, "BEHIND", walked)
    window, softcap = {"window": 37, "wide window": 90}.get(case), (4.0 if case == "cap" else None)
    edges, prefixes = [0], [None, None, 1, 1, 1, None, 5]
    for length in (20, prefix, 70, 1, 33, 12, 9):
        edges.append(edges[-1] + length)
    n, options = edges[-1], dict(scale=0.4, window=window, softcap=softcap)
    packed, dout = (draw(n, 4, 16), draw(n, 2, 16, seed=1), draw(n, 2, 16, seed=2)), draw(n, 4, 16, seed=3)
    attend = VarlenCausal(edges, DEVICE, prefixes=prefixes)
    assert attend.blocks.splits == -(-104 // walked)
    out, kept = attend.forward(*packed, **options)
    into = tuple(torch.full_like(t, 7.0) for t in packed)
    attend.backward(dout, *packed, out, kept, **options, into=into)
    exact = [t.double().cpu().requires_grad_() for t in packed]
    expanded, ends, own = whole(exact, edges, prefixes)
    expected = attend_reference(*expanded, ends, **options)[own]
    gradients = torch.autograd.grad(expected, exact, dout.double().cpu())
    near(out.cpu(), expected.detach())
    for ours, theirs in zip(into, gradients, strict=True):
        near(ours.cpu(), theirs, 8e-3)


@pytest.mark.parametrize("case", ["grouped", "window", "cap"])
def test_attention_of_the_last_tokens_of_documents(case):
    """Queries from the middle of a key block on, beside a whole document and a single token."""
    window, softcap = (37 if case == "window" else None), (4.0 if case == "cap" else None)
    edges, asking, asked = [0, 150, 170, 241], [83, 20, 1], [0, 83, 103, 104]
    q, k, v = draw(241, 2, 16), draw(241, 1, 16, seed=1), draw(241, 1, 16, seed=2)
    last = torch.cat([torch.arange(stop - n, stop) for stop, n in zip(edges[1:], asking, strict=True)])
    options = dict(scale=0.4, window=window, softcap=softcap)
    with torch.no_grad():
        out = VarlenCausal(asked, DEVICE, cu_keys=edges)(0, q[last.to(DEVICE)], k, v, **options)
    expected = attend_reference(*(t.double().cpu() for t in (q, k, v)), edges, **options)
    near(out.cpu(), expected[last])
