"""The torch definitions beside the kernels, against transformers' modules, formulas and autograd."""

import pytest
import torch

from local_tinker.model.kernels.head import logit_rows
from local_tinker.model.kernels.norm import KINDS, add_norm, norm_backward, rms_norm
from local_tinker.model.kernels.rope import HeadLayout, rotate, rotate_back_, rotate_qk
from local_tinker.model.kernels.swiglu import ACTIVATIONS, gated, gated_backward_

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_in_bf16_equal_the_modules_bit_for_bit(kind):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    made = {"round_then_scale": LlamaRMSNorm, "scale_then_round": Olmo2RMSNorm, "one_plus": Gemma2RMSNorm}[kind]
    module = made(64, eps=1e-5)
    module.weight.data = draw(64, dtype=torch.bfloat16)
    x, y = draw(200, 64, seed=1, dtype=torch.bfloat16) * 3, draw(200, 64, seed=2, dtype=torch.bfloat16) * 3
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    expected.backward(y)
    assert torch.equal(rms_norm(x, module.weight.data, 1e-5, kind), expected)
    dx = torch.empty_like(x)
    norm_backward(y, x, module.weight.data, 1e-5, kind, residual=None, out=dx)
    gap = (dx.float() - leaf.grad.float()).norm() / leaf.grad.float().norm()
    assert float(gap) < 4e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_sum_and_its_norm_and_the_way_back(kind):
    h, y, weight, dx, dh = (draw(5, 12, seed=i) for i in range(5))
    weight = weight[0]
    out, again = torch.empty(5, 12, dtype=F64), torch.empty(5, 12, dtype=F64)
    total = add_norm(h, y, weight, 1e-5, kind, out=out)
    leaf = (h + y).requires_grad_()
    scale = 1.0 + weight if kind == "one_plus" else weight
    expected = scale * leaf / (leaf.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(total, h + y)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(expected, leaf, dx)
    through = dh + slope
    norm_backward(dx, total, weight, 1e-5, kind, residual=dh, out=dh, again=again)
    torch.testing.assert_close(dh, through, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again, out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gated_activation_and_its_gradient(activation):
    gate, up, dy = (draw(5, 7, seed=i) for i in range(3))
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    g, u = leaves
    expected = (
        u
        * {
            "silu": g / (1 + torch.exp(-g)),
            "gelu": g * 0.5 * (1 + torch.erf(g / 2**0.5)),
            "gelu_tanh": g * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
        }[activation]
    )
    both = torch.cat([gate, up], dim=1)
    torch.testing.assert_close(gated(both, activation), expected.detach(), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(expected, leaves, dy)
    gated_backward_(both, dy, activation)
    torch.testing.assert_close(both, torch.cat(gradients, dim=1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dy, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("pairs", [4, 3, None])
def test_rotated_heads_and_the_way_back(pairs, normed, per_head):
    width = (lambda heads: 8) if per_head else (lambda heads: 8 * heads)
    weights = (draw(width(4), seed=5), draw(width(2), seed=6)) if normed else (None, None)
    layout = HeadLayout(4, 2, 8, "one_plus", 1e-5, per_head, *weights)
    angles = None if pairs is None else (draw(5, 1, pairs, seed=7).cos(), draw(5, 1, pairs, seed=7).sin())
    raw, direction = draw(5, 64), draw(5, 64, seed=1)
    leaf = raw.clone().requires_grad_()
    q, k, v = layout.split(leaf)
    parts = []
    for x, weight in ((q, weights[0]), (k, weights[1])):
        if normed:
            rows = x if per_head else x.flatten(1)
            x = ((1.0 + weight) * rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).view(x.shape)
        parts.append(x if angles is None else rotate(x, *angles))
    expected = torch.cat([t.flatten(1) for t in (*parts, v)], dim=1)
    (slope,) = torch.autograd.grad(expected, leaf, direction)
    torch.testing.assert_close(rotate_qk(raw.clone(), layout, angles), expected.detach(), rtol=1e-12, atol=1e-12)
    rotate_back_(direction, raw, layout, angles)
    torch.testing.assert_close(direction, slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_of_logits_against_log_softmax_and_autograd(softcap):
    z, y = draw(6, 11) * 3, torch.tensor([0, 3, 10, 5, 5, 1])
    leaf = z.clone().requires_grad_()
    shaped = 0.7 * leaf if softcap is None else softcap * torch.tanh(0.7 * leaf / softcap)
    log_p = shaped.log_softmax(1)
    target = log_p.gather(1, y[:, None])[:, 0]
    (slope,) = torch.autograd.grad(target.sum(), leaf, retain_graph=True)
    found = [torch.empty(6, dtype=F64), torch.empty(6, dtype=F64), torch.empty(6, 11, dtype=F64)]
    logit_rows(z, y, scale=0.7, softcap=softcap, logprobs=found[0], entropy=found[1], grad=found[2])
    for ours, theirs in zip(found, (target, -(log_p.exp() * log_p).sum(1), slope), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-11)
