import pytest
import torch

from local_tinker.model.head import Head, target_logprobs

F64 = torch.float64


@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("adapted", [False, True])
def test_value_gradient_and_entropy_equal_log_softmax_of_full_logits(columns, softcap, adapted):
    torch.manual_seed(1)
    h = torch.randn(11, 16, dtype=F64, requires_grad=True)
    weight, bias = torch.randn(50, 16, dtype=F64), torch.randn(50, dtype=F64)
    a, b = torch.randn(2, 16, dtype=F64, requires_grad=True), torch.randn(50, 2, dtype=F64, requires_grad=True)
    targets = torch.randint(0, 50, (11, columns) if columns else (11,))
    logits = h @ weight.t() + bias
    if adapted:
        logits = logits + 0.5 * (h @ a.t()) @ b.t()
    logits = logits * 1.3
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    full = logits.log_softmax(1)
    reference = full.gather(1, targets if columns else targets[:, None])
    reference = reference if columns else reference[:, 0]

    head = Head(weight, bias, softcap, 1.3)
    ours, entropy = target_logprobs(
        h, head, targets, pair=(a, b) if adapted else None, lora_scale=0.5, entropy=True, chunk=4
    )
    assert torch.allclose(ours, reference, atol=1e-12)
    assert torch.allclose(entropy, -(full.exp() * full).sum(1).detach(), atol=1e-11)
    leaves = [h, a, b] if adapted else [h]
    direction = torch.randn_like(reference)  # an arbitrary loss of the log-probs
    for got, want in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(reference, leaves, direction), strict=True
    ):
        assert torch.allclose(got, want, atol=1e-12)


def test_chunk_size_changes_nothing_but_rounding():
    torch.manual_seed(2)
    h, head, y = torch.randn(33, 8), Head(torch.randn(20, 8)), torch.randint(0, 20, (33,))
    whole, _ = target_logprobs(h, head, y, chunk=100)
    cut, _ = target_logprobs(h, head, y, chunk=5)
    assert torch.allclose(whole, cut, atol=1e-6)


def test_logits_of_a_bf16_model_keep_fp32_precision():
    torch.manual_seed(3)
    h, weight = torch.randn(40, 64).bfloat16() * 3, torch.randn(500, 64).bfloat16()
    y = torch.randint(0, 500, (40,))
    ours, _ = target_logprobs(h, Head(weight), y)
    exact = (h.double() @ weight.double().t()).log_softmax(1).gather(1, y[:, None])[:, 0]
    assert ours.dtype == torch.float32
    assert float((ours.double() - exact).abs().max()) < 2e-5


def test_without_gradient_nothing_is_kept_for_backward():
    h = torch.randn(6, 8)
    ours, entropy = target_logprobs(h, Head(torch.randn(20, 8)), torch.zeros(6, dtype=torch.long))
    assert not ours.requires_grad and entropy is None
